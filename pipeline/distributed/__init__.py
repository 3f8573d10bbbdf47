"""Ranks, collectives that fail on all ranks alike, process states, and warnings about slow operations."""
