"""Mamba operations in plain PyTorch. They run on CPUs, and tests compare the CUDA kernels with them.

Inputs may have any float type. Arithmetic and states are fp32, and the output has the type of `x`. Functions named
`..._step` process one position and update the state in place. The package `model` explains the axis letters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Number of positions whose [b, c, k] states are in memory at once. Longer scans are cut into blocks of this length, and
# each block is recomputed in the backward pass.
SCAN_BLOCK = 512


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a causal depthwise convolution, then silu.

    The output at a position depends on the inputs at this position and at the `d_conv - 1` positions before it.

    Shapes: x [b, l, c], weight [c, d_conv], bias [c].
    """
    width, length = weight.shape[1], x.shape[1]
    padded, taps = F.pad(x.float(), (0, 0, width - 1, 0)), weight.float().unbind(1)
    y = bias.float()
    for offset, tap in enumerate(taps):
        y = torch.addcmul(y, padded[:, offset : offset + length], tap)
    return F.silu(y).to(x.dtype)


def causal_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `causal_conv` at the next position, and update `state`, which holds the previous inputs.

    Shapes: x [b, c], state [b, c, d_conv - 1].
    """
    window = torch.cat([state, x[..., None].to(state.dtype)], -1)
    state.copy_(window[..., 1:])
    return F.silu((window.float() * weight.float()).sum(-1) + bias.float()).to(x.dtype)


# -- Mamba-1: a scalar recurrence per channel and state value ----------------------------------------------------------


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = (C_t h_t + D x_t) silu(z_t).

    Returns y and the last state h. The step size dt_t in these equations is softplus(dt + dt_bias). Without `z`, the
    factor silu(z_t) is left out.

    Shapes: x, dt, z [b, l, c]; A [c, k]; B, C [b, l, k]; D, dt_bias [c]; state [b, c, k].
    """
    parts = (x.float(), F.softplus(dt.float() + dt_bias), B.float(), C.float())
    recompute = torch.is_grad_enabled() and x.shape[1] > SCAN_BLOCK
    state, outputs = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32), []
    for block in zip(*(part.split(SCAN_BLOCK, 1) for part in parts), strict=True):
        if recompute:
            y, state = checkpoint(_scan_block, A, state, *block, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_block(A, state, *block)
        outputs.append(y)
    y = torch.cat(outputs, 1) + x.float() * D
    return (y if z is None else y * F.silu(z.float())).to(x.dtype), state


def _scan_block(A: Tensor, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    x, dt, B, C = (part.transpose(0, 1) for part in (x, dt, B, C))  # time first, to make positions contiguous
    decay = torch.exp(dt[..., None] * A)  # [l, b, c, k]
    driven = (dt * x)[..., None] * B[:, :, None]  # [l, b, c, k]
    states = _Recurrence.apply(decay, driven, state)
    return (states @ C[..., None]).squeeze(-1).transpose(0, 1), states[-1]


class _Recurrence(torch.autograd.Function):
    """Compute h[t] = decay[t] h[t-1] + driven[t] along the first axis.

    The loop runs one fused in-place operation per position. At sizes that run on a CPU, it is several times faster than
    a parallel scan, which has fewer steps but more arithmetic. Unlike some parallel scans, it computes no exponentials
    that could overflow.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, driven: Tensor, state: Tensor) -> Tensor:
        states = driven.clone()
        last = state
        for decay_t, state_t in zip(decay.unbind(), states.unbind(), strict=True):
            last = state_t.addcmul_(decay_t, last)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, state = ctx.saved_tensors
        grad = grad_states.clone()
        later = list(zip(decay.unbind(), grad.unbind(), strict=True))
        for (decay_next, grad_next), (_, grad_t) in zip(later[:0:-1], later[-2::-1], strict=True):
            grad_t.addcmul_(decay_next, grad_next)
        grad_decay = torch.empty_like(decay)
        torch.mul(grad[1:], states[:-1], out=grad_decay[1:])
        torch.mul(grad[0], state, out=grad_decay[0])
        return grad_decay, grad, decay[0] * grad[0]


def selective_scan_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Compute `selective_scan` at the next position. Shapes as in `selective_scan`, without the `l` axis."""
    xf, dt = x.float(), F.softplus(dt.float() + dt_bias)
    state.mul_(torch.exp(dt[..., None] * A)).add_((dt * xf)[..., None] * B.float()[:, None])
    y = (state @ C.float()[..., None]).squeeze(-1) + xf * D
    return (y * F.silu(z.float())).to(x.dtype)


# -- Mamba-2: one decay per head, so a chunk is a masked matrix product ------------------------------------------------


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of `selective_scan` with one A per head, in chunks (state-space duality, SSD).

    Returns y and the last state. The length `l` need not be a multiple of the chunk size, because the last chunk is
    padded with dt = 0, which leaves the state unchanged.

    Shapes: x [b, l, h, p]; dt [b, l, h]; A, D, dt_bias [h]; B, C [b, l, g, k]; state [b, h, p, k].
    """
    batch, length, heads, _ = x.shape
    chunk = -(-length // -(-length // chunk_size))  # chunks of equal length need less padding
    dt = F.softplus(dt.float() + dt_bias)
    parts = (x.float() * dt[..., None], (dt * A)[..., None], B.float(), C.float())
    xdt, log_decay, B, C = (_chunks(part, chunk, B.shape[2]) for part in parts)
    y, state = _ssd_chunks(xdt, log_decay.squeeze(-1), B.squeeze(-2), C.squeeze(-2))
    y = y.transpose(2, 3).reshape(batch, -1, heads, x.shape[-1])[:, :length]  # [b, m, g, q, r, p] -> [b, l, h, p]
    return (y + x.float() * D[:, None]).to(x.dtype), state.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _chunks(part: Tensor, chunk: int, groups: int) -> Tensor:
    """Cut the positions into chunks and the heads into groups: [b, l, h, values] becomes [b, m, g, q, r, values].

    The positions are padded with zeros to whole chunks. B and C have the axis g in place of h, so r is 1 for them.
    """
    part = F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % chunk))
    return part.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _ssd_chunks(xdt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute y [b, m, g, q, r, p] and the last state [b, g, k, r, p] from inputs that `_chunks` has split.

    The heads of a group share B and C, so one matrix product per chunk and group serves all heads of the group.

    Shapes: xdt [b, m, g, q, r, p], log_decay [b, m, g, q, r], B and C [b, m, g, q, k].
    """
    since_start = log_decay.cumsum(3)
    per_head = since_start.mT  # [b, m, g, r, q]
    # Log of the decay from one position (last axis) to another: [b, m, g, r, q, q].
    between = per_head[..., :, None] - per_head[..., None, :]
    future = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(1)
    weights = (C @ B.mT)[:, :, :, None] * between.masked_fill_(future, -torch.inf).exp_()
    within = (weights @ xdt.transpose(3, 4)).transpose(3, 4)

    until_end = torch.exp(since_start[:, :, :, -1:] - since_start)[..., None]
    added = (B.mT @ (xdt * until_end).flatten(4)).unflatten(4, xdt.shape[4:])  # [b, m, g, k, r, p]
    kept = torch.exp(since_start[:, :, :, -1])[:, :, :, None, :, None]
    state, before = torch.zeros_like(added[:, 0]), []
    for added_m, kept_m in zip(added.unbind(1), kept.unbind(1), strict=True):
        before.append(state)
        state = state * kept_m + added_m
    carried = (C @ torch.stack(before, 1).flatten(4)).unflatten(4, xdt.shape[4:])
    return within + carried * torch.exp(since_start)[..., None], state


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """Compute `ssd` at the next position. Shapes as in `ssd`, without the `l` axis."""
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (part.float().repeat_interleave(heads_per_group, 1) for part in (B, C))  # [b, h, k]
    xf, dt = x.float(), F.softplus(dt.float() + dt_bias)  # [b, h, p], [b, h]
    state.mul_(torch.exp(dt * A)[..., None, None]).add_((xf * dt[..., None])[..., None] * B[:, :, None])
    return ((state @ C[..., None]).squeeze(-1) + xf * D[:, None]).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) · weight, where the rms is over the last axis."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """Return the RMSNorm of x · silu(z), with a separate rms for each group of channels.

    This is mamba_ssm's `RMSNormGated` with `norm_before_gate=False`, which Mamba-2 uses.
    """
    gated = (x.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], None, eps)
    return (normed.flatten(-2) * weight.float()).to(x.dtype)
