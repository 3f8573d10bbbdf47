"""Shards in, a trained model that answers questions out."""
