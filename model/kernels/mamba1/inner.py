"""Training pass of a Mamba-1 mixer on a GPU with channels last, the counterpart of mamba_ssm's `mamba_inner_fn`.

The scan of mamba_ssm has time as the last axis and a backward pass that is twice as slow as the backward pass of
`model.kernels.mamba1.scan`. With channels last, no tensor is transposed between the scan and the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels import dispatch
from model.kernels.mamba1 import scan


def mamba1_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
) -> Tensor:
    """Return the output [b, l, d] of a mixer for the product xz [b, l, 2c] of its input with in_proj.

    The other arguments are the parameters of the mixer; dt_bias [c], A [c, k] and D [c] must be fp32.
    """
    return _Mamba1Inner.apply(xz, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj)


class _Mamba1Inner(torch.autograd.Function):
    """Keeps xz, the product with x_proj, and the scan's states; the backward pass recomputes all other activations."""

    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        out_proj: Tensor,
    ) -> Tensor:
        x = _conv(xz, conv_weight, conv_bias)
        low = x.flatten(0, 1) @ x_proj.t()
        dt, B, C = _scan_inputs(low, dt_weight, x.shape)
        out, states, _ = scan.scan_forward(x, dt, xz.chunk(2, -1)[1], B, C, A, D, dt_bias)
        ctx.save_for_backward(xz, low, states, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj)
        return out @ out_proj.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        xz, low, states, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj = ctx.saved_tensors
        x_in, z = xz.chunk(2, -1)
        grad_xz = torch.empty_like(xz)
        grad_x_in, grad_z = grad_xz.chunk(2, -1)
        x = _conv(xz, conv_weight, conv_bias)
        dt, B, C = _scan_inputs(low, dt_weight, x.shape)
        grad = grads[0].flatten(0, 1)
        grad_out = (grad @ out_proj).view(x.shape)
        gradients = scan.scan_backward(grad_out, states, grad_z, x, dt, z, B, C, A, D, dt_bias)
        # From here on, all tensors are matrices with a row per position of the batch, except in the convolution.
        rank, grad_dt, grad_low = dt_weight.shape[1], gradients.dt.flatten(0, 1), torch.empty_like(low)
        torch.mm(grad_dt, dt_weight, out=grad_low[:, :rank])
        grad_low[:, rank:] = gradients.BC.flatten(0, 1)
        gradients.x.flatten(0, 1).addmm_(grad_low, x_proj)
        _, grad_conv_weight, grad_conv_bias, *_ = dispatch.fused().causal_conv1d_bwd_function(
            x_in.mT, conv_weight, conv_bias, gradients.x.mT, None, None, None, grad_x_in.mT, False, True
        )
        grad_x_proj, grad_dt_weight = grad_low.t() @ x.flatten(0, 1), grad_dt.t() @ low[:, :rank]
        grad_out_proj = grad.t() @ gradients.out.flatten(0, 1)
        projections = (grad_x_proj, grad_dt_weight, gradients.dt_bias, gradients.A, gradients.D, grad_out_proj)
        return grad_xz, grad_conv_weight, grad_conv_bias, *projections


def _conv(xz: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return silu of the convolution of x [b, l, c]. Because x is a slice with channels last, it need not be copied."""
    conv = dispatch.fused().causal_conv1d_fwd_function
    return conv(xz.chunk(2, -1)[0].mT, weight, bias, None, None, None, True).mT


def _scan_inputs(low: Tensor, dt_weight: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Split the product with x_proj. Return dt [b, l, c] before its bias, and B and C [b, l, k]."""
    low = low.view(shape[0], shape[1], -1)
    rank = dt_weight.shape[1]
    B, C = low[..., rank:].chunk(2, -1)
    return (low.flatten(0, 1)[:, :rank] @ dt_weight.t()).view(shape), B, C
