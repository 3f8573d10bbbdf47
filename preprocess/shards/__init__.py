"""Shard sets: samples, tars, the manifest and the index, verification, the preview."""
