"""Ranks, collectives that raise the same error on all ranks, process states, and warnings about slow operations."""
