"""Triton kernels of a decode step: state updates, embedding, norms of larger batches, and argmax.

`model.kernels.decode_projections` explains the names in shapes, the split RMS norms and PDL.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.decode_common import inverse_rms, load_sums, silu, softplus, wait_for_inputs

# -- States ------------------------------------------------------------------------------------------------------------


@triton.jit
def mamba2_update_kernel(
    zxbcdt,  # [b, 2 * HEADS * P + 2 * STATE + HEADS]: z, x, B, C, dt; x, B, C after the convolution
    state,  # [b, HEADS, P, STATE], updated in place
    A,  # fp32 [HEADS]
    D,  # fp32 [HEADS]
    dt_bias,  # fp32 [HEADS]
    norm_weight,  # [HEADS * P], weight of the gated norm
    y,  # [b, HEADS * P]: the gated output times norm_weight
    sums,  # fp32 [b, HEADS * P // BLOCK_P]: partial sums of squares of the gated output
    HEADS: tl.constexpr,
    P: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1)
    head = part // (P // BLOCK_P)
    width: tl.constexpr = HEADS * P
    channels = part * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, STATE)
    state_at = state + (b.to(tl.int64) * width + channels[:, None]) * STATE + k[None, :]
    old = tl.load(state_at).to(tl.float32)
    decay_rate, skip, bias = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    gain = tl.load(norm_weight + channels).to(tl.float32)
    wait_for_inputs(PDL)
    row = zxbcdt + b * (2 * width + 2 * STATE + HEADS)
    z = tl.load(row + channels).to(tl.float32)
    x = tl.load(row + width + channels).to(tl.float32)
    # B and C are loaded once per channel, so that each thread loads the values that it needs (see _times_vector).
    wide = tl.broadcast_to(k[None, :], [BLOCK_P, STATE])
    B = tl.load(row + 2 * width + wide).to(tl.float32)
    C = tl.load(row + 2 * width + STATE + wide).to(tl.float32)
    dt = softplus(tl.load(row + 2 * width + 2 * STATE + head).to(tl.float32) + bias)
    new = old * tl.exp(dt * decay_rate) + (dt * x)[:, None] * B
    tl.store(state_at, new.to(state.dtype.element_ty))
    gated = (tl.sum(new * C, 1) + skip * x) * silu(z)
    tl.store(sums + b * (width // BLOCK_P) + part, tl.sum(gated * gated, 0))
    tl.store(y + b * width + channels, (gated * gain).to(y.dtype.element_ty))


@triton.jit
def mamba1_update_kernel(
    xz,  # [b, 2 * c]: x after the convolution, and z
    dbc,  # [b, RANK + 2 * STATE]: the low-rank form of dt, and B and C
    dt,  # [b, c] before its bias; None: it is computed from dbc and dt_weight
    dt_weight,  # [c, RANK]
    dt_bias,  # fp32 [c]
    A,  # fp32 [c, STATE]
    D,  # fp32 [c]
    state,  # [b, c, STATE], updated in place
    y,  # [b, c]
    c,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    b = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < c
    k, rank = tl.arange(0, STATE), tl.arange(0, RANK_PADDED)
    state_at = state + (b.to(tl.int64) * c + channels[:, None]) * STATE + k[None, :]
    old = tl.load(state_at, mask=inside[:, None], other=0.0).to(tl.float32)
    decay_rates = tl.load(A + channels[:, None] * STATE + k[None, :], mask=inside[:, None], other=0.0)
    skip, bias = tl.load(D + channels, mask=inside, other=0.0), tl.load(dt_bias + channels, mask=inside, other=0.0)
    if dt is None:
        at = dt_weight + channels[:, None] * RANK + rank[None, :]
        steps = tl.load(at, mask=inside[:, None] & (rank[None, :] < RANK), other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    row = dbc + b * (RANK + 2 * STATE)
    if dt is None:
        low_at = row + tl.broadcast_to(rank[None, :], [BLOCK_C, RANK_PADDED])
        low = tl.load(low_at, mask=rank[None, :] < RANK, other=0.0).to(tl.float32)
        step = tl.sum(steps * low, 1)
    else:
        step = tl.load(dt + b * c + channels, mask=inside, other=0.0).to(tl.float32)
    step = softplus(step + bias)
    wide = tl.broadcast_to(k[None, :], [BLOCK_C, STATE])
    B = tl.load(row + RANK + wide).to(tl.float32)
    C = tl.load(row + RANK + STATE + wide).to(tl.float32)
    x = tl.load(xz + b * 2 * c + channels, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(xz + b * 2 * c + c + channels, mask=inside, other=0.0).to(tl.float32)
    new = old * tl.exp(step[:, None] * decay_rates) + (step * x)[:, None] * B
    tl.store(state_at, new.to(state.dtype.element_ty), mask=inside[:, None])
    gated = (tl.sum(new * C, 1) + skip * x) * silu(z)
    tl.store(y + b * c + channels, gated.to(y.dtype.element_ty), mask=inside)


# -- Start and end of a step, and norms of larger batches --------------------------------------------------------------


@triton.jit
def embed_kernel(
    tokens,  # int64 [b]
    embedding,  # [vocab, d]
    norm_weight,  # [d], weight of the first layer's norm
    residual,  # fp32 [b, d]
    normed,  # [b, d]: the residual times norm_weight, divided by the rms of the residual if NORMALISE
    sums,  # fp32 [b, SUMS]: the sum of squares of the residual, then zeros
    d,
    eps,
    SUMS: tl.constexpr,
    SUMS_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < d
    value = tl.load(embedding + tl.load(tokens + b) * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + b * d + columns, value, mask=inside)
    square = tl.sum(value * value, 0)
    if NORMALISE:
        value *= tl.rsqrt(square / d + eps)
    else:
        index = tl.arange(0, SUMS_PADDED)
        tl.store(sums + b * SUMS + index, tl.where(index == 0, square, 0.0), mask=index < SUMS)
    value *= tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + b * d + columns, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
    branch,  # fp32 [SPLITS, b, d], partial sums of a matrix product whose input was not divided by its rms
    sums,  # fp32 [b, SUMS], partial sums of squares of that input
    residual,  # fp32 [b, d], updated in place
    norm_weight,  # [d]
    normed,  # [b, d]
    d,
    branch_eps,
    eps,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,  # number of values of that input
    SUMS: tl.constexpr,  # 0: the product is not divided by an rms
    SUMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    b, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < d
    gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    old = tl.load(residual + b * d + columns, mask=inside, other=0.0)
    if SUMS > 0:
        squares = load_sums(sums, b, SUMS, SUMS_PADDED)
    value = tl.load(branch + b * d + columns, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(branch + (split * tl.num_programs(0) + b) * d + columns, mask=inside, other=0.0)
    if SUMS > 0:
        value *= inverse_rms(squares, branch_eps, WIDTH)
    value += old
    tl.store(residual + b * d + columns, value, mask=inside)
    value *= tl.rsqrt(tl.sum(value * value, 0) / d + eps) * gain
    tl.store(normed + b * d + columns, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def argmax_kernel(values, indices, tokens, num_values, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Write the index of the first maximum of each row of values [b, num_values] into tokens [b].

    Unless `indices` is None, write the corresponding entry of `indices` instead of the index.
    """
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_values, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + b * num_values + at, mask=at < num_values, other=float("-inf")).to(tl.float32)
        found = tl.where(value > best, at, found)
        best = tl.maximum(value, best)
    first = tl.min(tl.where(best == tl.max(best, 0), found, num_values - 1), 0)
    if indices is not None:
        first = tl.load(indices + b * num_values + first)
    tl.store(tokens + b, first.to(tl.int64))
