"""Triton kernels of one decode step: projections with their norms and convolution, state updates, embedding, argmax.

`model.kernels.decode` launches them and `model.kernels.decode_reference` holds the same operations in plain torch. Import
this module only where Triton is installed.

Letters beside the package's: `n` rows of a weight matrix, `SUMS` partial sums of squares per sequence. RMS norms are
split: the producer of a vector multiplies by the norm's weight and writes partial sums of squares, and the consumer
scales its result by 1 / rms, because a matrix product commutes with a scalar.

PDL is programmatic dependent launch (compute capability 9.0): a kernel starts while the one before it ends, loads what
no kernel of this step writes (weights, and the states of its own layer), and then waits. The first kernel of a step is
launched without it, so that all kernels of the previous step have finished.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start, then wait until the previous kernel has finished writing."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + e^x), by its series where e^x is small, because 1 + e^x would round it away."""
    e = tl.exp(tl.minimum(x, 20.0))
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * (0.25 - e * 0.2))))
    return tl.where(x > 20.0, x, tl.where(e < 0.05, series, tl.log(1.0 + e)))


@triton.jit
def _load_sums(sums, b, SUMS: tl.constexpr, PADDED: tl.constexpr):
    """Partial sums of squares of sequence b, with zeros up to PADDED."""
    index = tl.arange(0, PADDED)
    return tl.load(sums + b * SUMS + index, mask=index < SUMS, other=0.0)


@triton.jit
def _inverse_rms(squares, eps, WIDTH: tl.constexpr):
    """1 / rms of a vector of WIDTH values, from partial sums of its squares."""
    return tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)


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
def _conv_history(
    state, step, inside, weight, bias, channels, convolved, CHANNELS: tl.constexpr, TAPS: tl.constexpr
):
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
            history = _conv_history(
                state, BATCH * c, convolved, conv_weight, conv_bias, channels, convolved, c, TAPS
            )
            histories = histories + (history,)
    _wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        if SUMS > 0:
            squares = _load_sums(sums, b, SUMS, SUMS_PADDED)
        result = _times_vector(tiles, x + b * X_STRIDE, rows, K, BLOCK_K)
        if SUMS > 0:
            result *= _inverse_rms(squares, eps, K)
        result = result.to(out.dtype.element_ty)
        if CONV_STOP > CONV_START:
            tl.store(conv_state + ((TAPS - 2) * BATCH + b) * c + channels, result, mask=convolved)
            result = tl.where(convolved, _silu(histories[b] + newest * result.to(tl.float32)), result.to(tl.float32))
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
    _wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        old = tl.load(residual + b * n + rows, mask=inside, other=0.0)
        if SUMS > 0:
            squares = _load_sums(sums, b, SUMS, SUMS_PADDED)
        branch = _times_vector(tiles, x + b * K, rows, K, BLOCK_K)
        if SUMS > 0:
            branch *= _inverse_rms(squares, eps, K)
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
    _wait_for_inputs(PDL)
    for b in tl.static_range(BATCH):
        squares = _load_sums(sums, b, SUMS, SUMS_PADDED)
        result = _times_vector(tiles, x + b * K, rows, K, BLOCK_K) * _inverse_rms(squares, eps, K)
        tl.store(logits + b * n + rows, result, mask=rows < n)
        value = tl.max(tl.where(rows < n, result, float("-inf")), 0)
        index = tl.min(tl.where((result == value) & (rows < n), rows, n), 0)
        tl.store(best_value + b * tl.num_programs(0) + tl.program_id(0), value)
        tl.store(best_index + b * tl.num_programs(0) + tl.program_id(0), index)


# -- Matrix products of larger batches ---------------------------------------------------------------------------------


@triton.jit
def _prefetch_rows(weight, rows, n, start, K: tl.constexpr, DEPTH: tl.constexpr):
    """Bring columns `start` to `start + DEPTH - 1` of rows of a matrix [n, K] into the L2 cache."""
    per_line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # a line has 128 bytes
    row_at = weight + tl.minimum(rows, n - 1)[:, None] * K
    for offset in tl.static_range(0, DEPTH, 8 * per_line):
        columns = tl.minimum(start + offset + tl.arange(0, 8) * per_line, K - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [row_at + columns[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def matmul_kernel(
    weight,  # [n, K]
    x,  # [batch, K]
    out,  # [SPLITS, batch, n], partial sums over equal ranges of K
    conv_state,  # [TAPS - 1, batch, c], as in project_kernel; SPLITS is 1 then
    conv_weight,
    conv_bias,
    n,
    batch,
    K: tl.constexpr,
    SPLITS: tl.constexpr,  # divides K / BLOCK_K
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
    if PDL:
        _prefetch_rows(weight, rows, n, split * depth, K, depth)
    if CONV_STOP > CONV_START:
        state = conv_state + b[None, :] * c + channels
        history = _conv_history(
            state, batch * c, inside, conv_weight, conv_bias, channels, convolved, c, TAPS
        )
        newest = _conv_tap(conv_weight, TAPS - 1, channels, convolved, c)
    _wait_for_inputs(PDL)
    k = tl.arange(0, BLOCK_K)
    result = tl.zeros([BLOCK_N, BATCH], tl.float32)
    for start in tl.range(split * depth, split * depth + depth, BLOCK_K, num_stages=STAGES):
        inside_w, inside_x = (rows < n)[:, None], (b < batch)[None, :]
        if K % BLOCK_K != 0:
            inside_w, inside_x = inside_w & (start + k < K)[None, :], inside_x & (start + k < K)[:, None]
        w = tl.load(weight + rows[:, None] * K + (start + k)[None, :], mask=inside_w, other=0.0)
        v = tl.load(x + b[None, :] * K + (start + k)[:, None], mask=inside_x, other=0.0)
        result = tl.dot(w, v, result, input_precision="ieee")
    if CONV_STOP > CONV_START:
        rounded = result.to(conv_state.dtype.element_ty)
        tl.store(state + (TAPS - 2) * batch * c, rounded, mask=inside)
        result = tl.where(convolved, _silu(history + newest * rounded.to(tl.float32)), result)
    at = out + (split * batch + b[None, :]) * n + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (b < batch)[None, :])


# -- States ------------------------------------------------------------------------------------------------------------


@triton.jit
def mamba2_update_kernel(
    zxbcdt,  # [b, 2 * HEADS * P + 2 * STATE + HEADS], x, B and C after the convolution
    state,  # [b, HEADS, P, STATE], updated in place
    A,  # fp32 [HEADS]
    D,  # fp32 [HEADS]
    dt_bias,  # fp32 [HEADS]
    norm_weight,  # [HEADS * P], of the gated norm
    y,  # [b, HEADS * P]: the gated output times norm_weight
    sums,  # fp32 [b, HEADS * P // BLOCK_P]: squares of the gated output
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
    _wait_for_inputs(PDL)
    row = zxbcdt + b * (2 * width + 2 * STATE + HEADS)
    z = tl.load(row + channels).to(tl.float32)
    x = tl.load(row + width + channels).to(tl.float32)
    wide = tl.broadcast_to(k[None, :], [BLOCK_P, STATE])  # loaded in the state's layout, see _times_vector
    B = tl.load(row + 2 * width + wide).to(tl.float32)
    C = tl.load(row + 2 * width + STATE + wide).to(tl.float32)
    dt = _softplus(tl.load(row + 2 * width + 2 * STATE + head).to(tl.float32) + bias)
    new = old * tl.exp(dt * decay_rate) + (dt * x)[:, None] * B
    tl.store(state_at, new.to(state.dtype.element_ty))
    gated = (tl.sum(new * C, 1) + skip * x) * _silu(z)
    tl.store(sums + b * (width // BLOCK_P) + part, tl.sum(gated * gated, 0))
    tl.store(y + b * width + channels, (gated * gain).to(y.dtype.element_ty))


@triton.jit
def mamba1_update_kernel(
    xz,  # [b, 2 * c], x after the convolution
    dbc,  # [b, RANK + 2 * STATE]
    dt,  # [b, c] before its bias, or None: computed from dbc
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
    _wait_for_inputs(PDL)
    row = dbc + b * (RANK + 2 * STATE)
    if dt is None:
        low_at = row + tl.broadcast_to(rank[None, :], [BLOCK_C, RANK_PADDED])
        low = tl.load(low_at, mask=rank[None, :] < RANK, other=0.0).to(tl.float32)
        step = tl.sum(steps * low, 1)
    else:
        step = tl.load(dt + b * c + channels, mask=inside, other=0.0).to(tl.float32)
    step = _softplus(step + bias)
    wide = tl.broadcast_to(k[None, :], [BLOCK_C, STATE])
    B = tl.load(row + RANK + wide).to(tl.float32)
    C = tl.load(row + RANK + STATE + wide).to(tl.float32)
    x = tl.load(xz + b * 2 * c + channels, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(xz + b * 2 * c + c + channels, mask=inside, other=0.0).to(tl.float32)
    new = old * tl.exp(step[:, None] * decay_rates) + (step * x)[:, None] * B
    tl.store(state_at, new.to(state.dtype.element_ty), mask=inside[:, None])
    gated = (tl.sum(new * C, 1) + skip * x) * _silu(z)
    tl.store(y + b * c + channels, gated.to(y.dtype.element_ty), mask=inside)


# -- The ends of a step, and norms of large batches --------------------------------------------------------------------


@triton.jit
def embed_kernel(
    tokens,  # int64 [b]
    embedding,  # [vocab, d]
    norm_weight,  # [d], of the first layer
    residual,  # fp32 [b, d]
    normed,  # [b, d]: the residual times norm_weight, over its rms if NORMALISE
    sums,  # fp32 [b, SUMS]: the sum of squares and zeros
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
    branch,  # [SPLITS, b, d], partial sums of a matrix product whose input was not divided by its rms
    sums,  # fp32 [b, SUMS], of that input
    residual,  # fp32 [b, d], updated in place
    norm_weight,  # [d]
    normed,  # [b, d]
    d,
    branch_eps,
    eps,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,  # of that input
    SUMS: tl.constexpr,  # 0: nothing is left to divide by
    SUMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    b, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < d
    gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    _wait_for_inputs(PDL)
    value = tl.load(branch + b * d + columns, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        at = branch + (split * tl.num_programs(0) + b) * d + columns
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SUMS > 0:
        value *= _inverse_rms(_load_sums(sums, b, SUMS, SUMS_PADDED), branch_eps, WIDTH)
    value += tl.load(residual + b * d + columns, mask=inside, other=0.0)
    tl.store(residual + b * d + columns, value, mask=inside)
    value *= tl.rsqrt(tl.sum(value * value, 0) / d + eps) * gain
    tl.store(normed + b * d + columns, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def argmax_kernel(values, indices, tokens, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """tokens[b] = the index (or the entry of `indices`, unless None) of the first maximum of values [b, n]."""
    _wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + b * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
        found = tl.where(value > best, at, found)
        best = tl.maximum(value, best)
    first = tl.min(tl.where(best == tl.max(best, 0), found, n - 1), 0)
    if indices is not None:
        first = tl.load(indices + b * n + first)
    tl.store(tokens + b, first.to(tl.int64))
