"""Answering with a trained model: loading it, decoding, and choosing tokens."""
