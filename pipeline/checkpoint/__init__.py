"""Saving, verifying, resuming and deleting checkpoints."""
