"""Checkpoints: saving, verifying, resuming, resharding and deleting."""
