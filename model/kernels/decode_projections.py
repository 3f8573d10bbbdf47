"""Triton kernels of a decode step: matrix products, each fused with a norm and a convolution, residual or argmax.

`model.kernels.decode` launches these kernels, and `model.kernels.decode_reference` has the same operations in plain
PyTorch. Import this module only where Triton is installed.

Shapes use the axis letters that the package `model` explains, and parameters of the kernels: a weight matrix has
`num_rows` rows and `K` columns, and `programs` is the number of programs (thread blocks) of the launch.

RMS norms are split between two kernels, which is possible because dividing a vector by its rms can be postponed until
after a matrix product. The kernel that computes the vector multiplies it by the norm's weight, and writes `SUMS`
partial sums of the vector's squares per sequence. The kernel that multiplies a matrix by the vector computes the rms
from the partial sums, and divides the product by the rms.

PDL is programmatic dependent launch, which needs compute capability 9.0. A kernel starts while the previous kernel is
still running. It loads data that no other kernel of this step writes: the weights, and the states of its own layer. It
then waits until the previous kernel has finished. The first kernel of a step is launched without PDL, so that it starts
after all kernels of the previous step have finished.
"""

# ruff: noqa: RUF005 (Triton has no unpacking)
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.decode_common import inverse_rms, load_sums, silu, wait_for_inputs

# -- Matrix-vector products --------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(weight, rows, num_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load some rows of a matrix [num_rows, K], as a tuple of tiles that have BLOCK_K columns each."""
    columns = tl.arange(0, BLOCK_K)
    tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        inside = rows[:, None] < num_rows
        if K % BLOCK_K != 0:
            inside = inside & (start + columns[None, :] < K)
        at = weight + rows[:, None] * K + start + columns[None, :]
        tiles = tiles + (tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _times_vector(tiles, x, rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Multiply the rows that `_load_rows` loaded by a vector x [K]. Return one fp32 product per row.

    Each thread loads the values of x by which its own weights are multiplied. If a program loaded x only once and
    shared it through shared memory, it would need barriers between the loads, and their latencies would add up.
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
    """Shift a convolution's state by one position. Return the bias plus the contribution of the previous inputs.

    `state` points to the oldest input of the channels. Each newer input is stored `step` values further on.
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
    weight,  # [num_rows, K]
    x,  # [b, K], whose rows start X_STRIDE values apart
    sums,  # fp32 [b, SUMS], partial sums of squares of x
    out,  # [b, num_rows]
    conv_state,  # [TAPS - 1, b, c]; channel i of the convolution is output CONV_START + i
    conv_weight,  # [TAPS, c], where TAPS is the kernel size of the convolution
    conv_bias,  # [c]
    num_rows,
    eps,
    BATCH: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SUMS: tl.constexpr,  # 0: x is not divided by its rms
    SUMS_PADDED: tl.constexpr,
    CONV_START: tl.constexpr,
    CONV_STOP: tl.constexpr,  # one past the last convolved output; equal to CONV_START: no convolution
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = _load_rows(weight, rows, num_rows, K, BLOCK_K)
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
        tl.store(out + b * num_rows + rows, result.to(out.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def project_residual_kernel(
    weight,  # [num_rows, K]
    x,  # [b, K]
    sums,  # fp32 [b, SUMS], partial sums of squares of x
    residual,  # fp32 [b, num_rows], updated in place
    norm_weight,  # [num_rows], weight of the norm after this residual
    normed,  # [b, num_rows]: the new residual times norm_weight
    out_sums,  # fp32 [b, programs]: partial sums of squares of the new residual
    num_rows,
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
    inside = rows < num_rows
    tiles = _load_rows(weight, rows, num_rows, K, BLOCK_K)
    gain = tl.load(norm_weight + rows, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        old = tl.load(residual + b * num_rows + rows, mask=inside, other=0.0)
        if SUMS > 0:
            squares = load_sums(sums, b, SUMS, SUMS_PADDED)
        branch = _times_vector(tiles, x + b * K, rows, K, BLOCK_K)
        if SUMS > 0:
            branch *= inverse_rms(squares, eps, K)
        new = old + branch
        tl.store(residual + b * num_rows + rows, new, mask=inside)
        tl.store(normed + b * num_rows + rows, (new * gain).to(normed.dtype.element_ty), mask=inside)
        tl.store(out_sums + b * tl.num_programs(0) + tl.program_id(0), tl.sum(new * new, 0))


@triton.jit
def project_vocabulary_kernel(
    weight,  # [num_rows, K]
    x,  # [b, K]
    sums,  # fp32 [b, SUMS], partial sums of squares of x
    logits,  # fp32 [b, num_rows]
    best_value,  # fp32 [b, programs]: the largest logit of the program's rows
    best_index,  # int32 [b, programs]: the index of this logit
    num_rows,
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
    tiles = _load_rows(weight, rows, num_rows, K, BLOCK_K)
    wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        squares = load_sums(sums, b, SUMS, SUMS_PADDED)
        result = _times_vector(tiles, x + b * K, rows, K, BLOCK_K) * inverse_rms(squares, eps, K)
        tl.store(logits + b * num_rows + rows, result, mask=rows < num_rows)
        value = tl.max(tl.where(rows < num_rows, result, float("-inf")), 0)
        index = tl.min(tl.where((result == value) & (rows < num_rows), rows, num_rows), 0)
        tl.store(best_value + b * tl.num_programs(0) + tl.program_id(0), value)
        tl.store(best_index + b * tl.num_programs(0) + tl.program_id(0), index)


# -- Matrix products of larger batches ---------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(
    weight,  # tensor descriptor of [num_rows, K], blocks [BLOCK_N, BLOCK_K]
    x,  # tensor descriptor of [batch, K], blocks [BATCH, BLOCK_K]
    out,  # [SPLITS, batch, num_rows], partial sums over equal ranges of columns
    conv_state,  # [TAPS - 1, batch, c], as in project_kernel; only with SPLITS = 1
    conv_weight,
    conv_bias,
    num_rows,
    batch,
    K: tl.constexpr,
    SPLITS: tl.constexpr,  # 1, or a divisor of K / BLOCK_K
    CONV_START: tl.constexpr,
    CONV_STOP: tl.constexpr,
    TAPS: tl.constexpr,
    BATCH: tl.constexpr,  # sequences per program, at least 16
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
    at = out + (split * batch + b[None, :]) * num_rows + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (b < batch)[None, :])
