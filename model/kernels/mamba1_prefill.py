"""Mamba-1's mixer over a prompt on a GPU, with time as the last axis where the scan's kernel wants it.

The reference is the composition in `model.mamba.Mamba1Mixer.prefill`, which would copy x, dt, z and y to transpose
them. Here in_proj and dt_proj are multiplied from the left, so that their results come out with time last. That is
faster where b * l is a multiple of 8: rows of other lengths are not aligned to 16 bytes, and their products are slow.
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the mixer with its weights. dt_bias, A [c, k] and D are fp32.

    Returns the output [b, l, d], the convolution's state [b, c, taps - 1] and the scan's fp32 state [b, c, k].
    """
    batch, length, _ = x.shape
    kernels, rank, d_state = dispatch.fused(), dt_weight.shape[1], A.shape[1]
    xz = in_proj @ x.flatten(0, 1).t()  # [2c, b * l]
    x, z = xz.view(-1, batch, length).transpose(0, 1).chunk(2, 1)  # [b, c, l]
    conv_state = dispatch.conv_state(x.mT, conv_weight.shape[1])
    x = kernels.causal_conv1d_fn(x, conv_weight, conv_bias, activation="silu")
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
