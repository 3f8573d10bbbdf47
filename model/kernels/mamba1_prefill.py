"""Prefill of a Mamba-1 mixer on a GPU, without copies that transpose tensors.

The kernel of the scan needs time as the last axis. The general implementation in `model.mamba.Mamba1Mixer.prefill` has
channels last, so it must transpose x, dt, z and y by copying them. Here the weights of in_proj and dt_proj are
multiplied from the left, so that their results already have time last.

This is faster only if b * l is a multiple of 8. Otherwise the rows of the matrices are not aligned to 16 bytes, which
makes the matrix products slow.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels import dispatch


def mamba1_prefill(
    x: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of the mixer for x [b, l, d], and its states after the last position.

    The mask [b, l, 1] is that of `model.mamba.Mixer.prefill`. The other arguments are the parameters of the mixer;
    dt_bias, A [c, k] and D must be fp32.

    Returns: The output [b, l, d], the convolution's state [b, c, d_conv - 1], and the scan's fp32 state [b, c, k].
    """
    batch, length, _ = x.shape
    kernels, rank, d_state = dispatch.fused(), dt_weight.shape[1], A.shape[1]
    xz = in_proj @ x.flatten(0, 1).t()  # [2c, b * l]
    x, z = xz.view(-1, batch, length).transpose(0, 1).chunk(2, 1)  # [b, c, l]
    conv_state = dispatch.conv_state(x.mT, conv_weight.shape[1])
    x = kernels.causal_conv1d_fn(x, conv_weight, conv_bias, activation="silu")
    if mask is not None:
        x = x * mask.mT
    low, B, C = (x.mT.reshape(batch * length, -1) @ x_proj.t()).split([rank, d_state, d_state], 1)
    dt = (dt_weight @ low.t()).view(-1, batch, length).transpose(0, 1)  # [b, c, l]
    B, C = (part.view(batch, length, d_state).mT.contiguous() for part in (B, C))
    y, ssm_state = kernels.selective_scan_fn(
        x,
        dt,
        A,
        B,
        C,
        D,
        z=z,
        delta_bias=dt_bias,
        delta_softplus=True,
        return_last_state=True,
    )
    out = y.mT.reshape(batch * length, -1) @ out_proj.t()
    return out.view(batch, length, -1), conv_state, ssm_state.float().contiguous()
