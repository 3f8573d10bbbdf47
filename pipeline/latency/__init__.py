"""Latency of answers: the protocol of the paper's Tab. 4, and time by phase, batch size and implementation."""
