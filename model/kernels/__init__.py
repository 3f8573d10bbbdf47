"""Mamba's operations: fused CUDA kernels and their plain-torch references."""
