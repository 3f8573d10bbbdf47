"""Annotations and images in, WebDataset shards with a manifest and an index out."""
