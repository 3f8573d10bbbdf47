"""Inference with an exported model: the engine, its requests, and dialogues."""
