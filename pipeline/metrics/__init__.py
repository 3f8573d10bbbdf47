"""Metrics: logging, timing, history and figures."""
