"""Training, export and evaluation: from shards to a trained model that answers questions."""
