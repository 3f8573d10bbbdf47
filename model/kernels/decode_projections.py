"""Triton kernels of a decode step: matrix products with the norm, convolution, residual or argmax around them.

`model.kernels.decode` launches them and `model.kernels.decode_reference` holds the same operations in plain torch.
Import this module only where Triton is installed.

Letters beside the package's: `n` rows of a weight matrix, `SUMS` partial sums of squares per sequence. RMS norms are
split: the producer of a vector multiplies by the norm's weight and writes partial sums of squares, and the consumer
scales its result by 1 / rms, because a matrix product commutes with a scalar.

PDL is programmatic dependent launch (compute capability 9.0): a kernel starts while the one before it ends, loads what
no other kernel of this step writes (weights, and the states of its own layer), and then waits. The first kernel of a
step is launched without it, so that all kernels of the previous step have finished.
"""

# ruff: noqa: RUF005 (Triton has no unpacking)
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.decode_common import inverse_rms, load_sums, silu, wait_for_inputs

# -- Matrix-vector products --------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(weight, rows, n, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load rows of a matrix [n, K] as a tuple of tiles [rows, BLOCK_K]."""
    columns = tl.arange(0, BLOCK_K)
    tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        inside = rows[:, None] < n
        if K % BLOCK_K != 0:
            inside = inside & (start + columns[None, :] < K)
        at = weight + rows[:, None] * K + start + columns[None, :]
        tiles = tiles + (tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _times_vector(tiles, x, rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Multiply loaded rows by one vector x [K]. Returns fp32 [rows].

    Every thread loads the values of x that its own weights meet. One load per block, spread through shared memory,
    would put a barrier between the loads, so that their latencies add up.
    """
    shape: tl.constexpr = [rows.shape[0], BLOCK_K]
    columns = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, :], shape)
    values = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if K % BLOCK_K != 0:
            values = values + (tl.load(x + start + columns, mask=start + columns < K, other=0.0),)
        else:
            values = values + (tl.load(x + start + columns),)
    total = tl.zeros(shape, tl.float32)
    for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        total += tiles[i].to(tl.float32) * values[i].to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def _conv_tap(weight, tap, channels, convolved, CHANNELS: tl.constexpr):
    return tl.load(weight + tap * CHANNELS + channels, mask=convolved, other=0.0).to(tl.float32)


@triton.jit
def _conv_history(state, step, inside, weight, bias, channels, convolved, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Shift a convolution's state by one position. Returns the bias plus what the old inputs give.

    `state` points to the oldest input of the channels; newer inputs follow `step` values apart.
    """
    total = tl.load(bias + channels, mask=convolved, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(state + tap * step, mask=inside, other=0.0)
        total += old.to(tl.float32) * _conv_tap(weight, tap, channels, convolved, CHANNELS)
        if tap > 0:
            tl.store(state + (tap - 1) * step, old, mask=inside)
    return total


@triton.jit
def project_kernel(
    weight,  # [n, K]
    x,  # [b, K], sequences X_STRIDE apart
    sums,  # fp32 [b, SUMS], of x
    out,  # [b, n]
    conv_state,  # [TAPS - 1, b, c], where channel i is row CONV_START + i of the weight
    conv_weight,  # [TAPS, c]
    conv_bias,  # [c]
    n,
    eps,
    BATCH: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SUMS: tl.constexpr,  # 0: x is not scaled
    SUMS_PADDED: tl.constexpr,
    CONV_START: tl.constexpr,
    CONV_STOP: tl.constexpr,  # equal to CONV_START: no convolution
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = _load_rows(weight, rows, n, K, BLOCK_K)
    convolved = (rows >= CONV_START) & (rows < CONV_STOP)
    channels = rows - CONV_START
    c: tl.constexpr = CONV_STOP - CONV_START
    histories = ()
    if CONV_STOP > CONV_START:
        newest = _conv_tap(conv_weight, TAPS - 1, channels, convolved, c)
        for b in tl.static_range(BATCH):
            state = conv_state + b * c + channels
            history = _conv_history(state, BATCH * c, convolved, conv_weight, conv_bias, channels, convolved, c, TAPS)
            histories = histories + (history,)
    wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        if SUMS > 0:
            squares = load_sums(sums, b, SUMS, SUMS_PADDED)
        result = _times_vector(tiles, x + b * X_STRIDE, rows, K, BLOCK_K)
        if SUMS > 0:
            result *= inverse_rms(squares, eps, K)
        result = result.to(out.dtype.element_ty)
        if CONV_STOP > CONV_START:
            tl.store(conv_state + ((TAPS - 2) * BATCH + b) * c + channels, result, mask=convolved)
            result = tl.where(convolved, silu(histories[b] + newest * result.to(tl.float32)), result.to(tl.float32))
        tl.store(out + b * n + rows, result.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def project_residual_kernel(
    weight,  # [n, K]
    x,  # [b, K]
    sums,  # fp32 [b, SUMS], of x
    residual,  # fp32 [b, n], updated in place
    norm_weight,  # [n], of the norm that follows
    normed,  # [b, n]: the new residual times norm_weight
    out_sums,  # fp32 [b, programs]: squares of the new residual
    n,
    eps,
    BATCH: tl.constexpr,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    tiles = _load_rows(weight, rows, n, K, BLOCK_K)
    gain = tl.load(norm_weight + rows, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        old = tl.load(residual + b * n + rows, mask=inside, other=0.0)
        if SUMS > 0:
            squares = load_sums(sums, b, SUMS, SUMS_PADDED)
        branch = _times_vector(tiles, x + b * K, rows, K, BLOCK_K)
        if SUMS > 0:
            branch *= inverse_rms(squares, eps, K)
        new = old + branch
        tl.store(residual + b * n + rows, new, mask=inside)
        tl.store(normed + b * n + rows, (new * gain).to(normed.dtype.element_ty), mask=inside)
        tl.store(out_sums + b * tl.num_programs(0) + tl.program_id(0), tl.sum(new * new, 0))


@triton.jit
def project_vocabulary_kernel(
    weight,  # [n, K]
    x,  # [b, K]
    sums,  # fp32 [b, SUMS], of x
    logits,  # fp32 [b, n]
    best_value,  # fp32 [b, programs]
    best_index,  # int32 [b, programs]
    n,
    eps,
    BATCH: tl.constexpr,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = _load_rows(weight, rows, n, K, BLOCK_K)
    wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        squares = load_sums(sums, b, SUMS, SUMS_PADDED)
        result = _times_vector(tiles, x + b * K, rows, K, BLOCK_K) * inverse_rms(squares, eps, K)
        tl.store(logits + b * n + rows, result, mask=rows < n)
        value = tl.max(tl.where(rows < n, result, float("-inf")), 0)
        index = tl.min(tl.where((result == value) & (rows < n), rows, n), 0)
        tl.store(best_value + b * tl.num_programs(0) + tl.program_id(0), value)
        tl.store(best_index + b * tl.num_programs(0) + tl.program_id(0), index)


# -- Matrix products of larger batches ---------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(
    weight,  # tensor descriptor of [n, K], blocks [BLOCK_N, BLOCK_K]
    x,  # tensor descriptor of [batch, K], blocks [BATCH, BLOCK_K]
    out,  # [SPLITS, batch, n], partial sums over equal ranges of K
    conv_state,  # [TAPS - 1, batch, c], as in project_kernel; SPLITS is 1 then
    conv_weight,
    conv_bias,
    n,
    batch,
    K: tl.constexpr,
    SPLITS: tl.constexpr,  # 1, or a divisor of K / BLOCK_K
    CONV_START: tl.constexpr,
    CONV_STOP: tl.constexpr,
    TAPS: tl.constexpr,
    BATCH: tl.constexpr,  # sequences of one program, 16 or more
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    depth: tl.constexpr = (K + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    convolved, channels = ((rows >= CONV_START) & (rows < CONV_STOP))[:, None], (rows - CONV_START)[:, None]
    inside = convolved & (b < batch)[None, :]
    c: tl.constexpr = CONV_STOP - CONV_START
    if CONV_STOP > CONV_START:
        state = conv_state + b[None, :] * c + channels
        history = _conv_history(state, batch * c, inside, conv_weight, conv_bias, channels, convolved, c, TAPS)
        newest = _conv_tap(conv_weight, TAPS - 1, channels, convolved, c)
    wait_for_inputs(PDL)
    row, first = tl.program_id(0) * BLOCK_N, tl.program_id(2) * BATCH
    result = tl.zeros([BLOCK_N, BATCH], tl.float32)
    for start in tl.range(split * depth, split * depth + depth, BLOCK_K, num_stages=STAGES):
        result = tl.dot(weight.load([row, start]), x.load([first, start]).T, result, input_precision="ieee")
    if CONV_STOP > CONV_START:
        rounded = result.to(conv_state.dtype.element_ty)
        tl.store(state + (TAPS - 2) * batch * c, rounded, mask=inside)
        result = tl.where(convolved, silu(history + newest * rounded.to(tl.float32)), result)
    at = out + (split * batch + b[None, :]) * n + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (b < batch)[None, :])
