"""The operations of `model.kernels.decode` in plain PyTorch, with which tests compare its Triton kernels.

The functions have the same arguments without output buffers and tile sizes, and they return what the kernels write.
States and residuals are updated in place. Arithmetic is fp32. No intermediate result is rounded to a smaller type,
except the input of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import reference


def inverse_rms(sums: Tensor | None, width: int, eps: float) -> Tensor | float:
    """Return 1 / rms [b, 1] of vectors [b, width] from partial sums of their squares, or 1 if `sums` is None.

    Args:
        sums: Partial sums of squares, any number per vector. Each row adds up to the sum of squares of its vector.
    """
    return 1.0 if sums is None else torch.rsqrt(sums.sum(1, keepdim=True) / width + eps)


def project(weight: Tensor, x: Tensor, sums: Tensor | None, eps: float) -> Tensor:
    return x.float() @ weight.float().t() * inverse_rms(sums, x.shape[1], eps)


def project_conv(
    weight: Tensor,
    x: Tensor,
    sums: Tensor | None,
    eps: float,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    start: int,
) -> Tensor:
    out = project(weight, x, sums, eps).to(x.dtype)
    stop = start + conv_weight.shape[0]
    convolved = reference.causal_conv_step(out[:, start:stop].float(), state, conv_weight, conv_bias)
    return torch.cat([out[:, :start].float(), convolved, out[:, stop:].float()], 1)


def project_residual(
    weight: Tensor, x: Tensor, sums: Tensor | None, eps: float, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Add weight · x / rms(x) to the residual. Return residual · norm_weight, and the residual's sum of squares [b]."""
    residual += project(weight, x, sums, eps)
    return residual * norm_weight.float(), residual.square().sum(1)


def mamba2_update(
    zxbcdt: Tensor, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the states. Return y · silu(z) · norm_weight [b, c], and the sum of squares of y · silu(z) [b]."""
    _, heads, head_dim, d_state = state.shape
    channels = heads * head_dim
    z, x, B, C, dt = zxbcdt.float().split([channels, channels, d_state, d_state, heads], 1)
    y = reference.ssd_step(state, x.unflatten(1, (heads, -1)), dt, A, B[:, None], C[:, None], D, dt_bias)
    gated = y.flatten(1) * torch.nn.functional.silu(z)
    return gated * norm_weight.float(), gated.square().sum(1)


def mamba1_update(
    xz: Tensor, dbc: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """Advance the states. Return y · silu(z) [b, c]."""
    x, z = xz.float().chunk(2, 1)
    d_state = A.shape[1]
    low, B, C = dbc.float().split([dt_weight.shape[1], d_state, d_state], 1)
    return reference.selective_scan_step(state, x, low @ dt_weight.float().t(), A, B, C, D, z, dt_bias)


def embed(tokens: Tensor, embedding: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embed the tokens. Return the residual, residual · norm_weight, and the residual's sum of squares [b]."""
    residual = embedding[tokens].float()
    return residual, residual * norm_weight.float(), residual.square().sum(1)


def add_norm(
    branch: Tensor,
    sums: Tensor | None,
    sums_width: int,
    branch_eps: float,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    residual += branch.float() * inverse_rms(sums, sums_width, branch_eps)
    return reference.rms_norm(residual, norm_weight, eps)
