"""Shard sets: samples, tars, manifest, index, verification and preview."""
