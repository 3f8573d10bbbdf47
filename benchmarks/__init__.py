"""Benchmarks that produce the figures in the README and in docs/. Each prints a table or writes one."""
