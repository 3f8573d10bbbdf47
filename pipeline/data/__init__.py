"""Reading shards in the order of the training plan."""
