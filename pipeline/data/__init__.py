"""Training data: the plan, the data loader and the shard reader."""
