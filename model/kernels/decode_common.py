"""Triton functions that several kernels of a decode step call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Allow the next kernel to start, then wait until the previous kernel has finished writing. Do nothing without PDL.

    `model.kernels.decode_projections` explains PDL.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Compute log(1 + e^x). Where e^x is small, a series is used, because 1 + e^x would round e^x away."""
    e = tl.exp(tl.minimum(x, 20.0))
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * (0.25 - e * 0.2))))
    return tl.where(x > 20.0, x, tl.where(e < 0.05, series, tl.log(1.0 + e)))


@triton.jit
def load_sums(sums, b, SUMS: tl.constexpr, PADDED: tl.constexpr):
    """Load the SUMS partial sums of squares of sequence b, padded with zeros to PADDED values."""
    index = tl.arange(0, PADDED)
    return tl.load(sums + b * SUMS + index, mask=index < SUMS, other=0.0)


@triton.jit
def inverse_rms(squares, eps, WIDTH: tl.constexpr):
    """Compute 1 / rms of a vector of WIDTH values from the partial sums of its squares."""
    return tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
