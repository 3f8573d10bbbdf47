"""Mamba operations: fused CUDA kernels, and reference implementations of them in plain PyTorch."""
