"""Preprocessing, which builds WebDataset shards with a manifest and an index from annotations and images."""
