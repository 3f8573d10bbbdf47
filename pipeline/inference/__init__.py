"""Inference with an exported model: loading and greedy decoding."""
