"""Launchers of the Triton kernels that make up a decode step, on preallocated tensors.

Each launcher writes its results into buffers that the caller passes, so that a CUDA graph can replay the launches.
`model.kernels.decode_reference` has functions of the same names in plain PyTorch, for comparison in tests.
`model.kernels.decode_projections` explains the partial sums of squares (`sums`) and PDL (`pdl`).

Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels import decode_projections, decode_states

MAX_VECTORS = 2  # largest batch for which matrix-vector products are faster than matrix products


class Tile(NamedTuple):
    """Shape of a program (thread block) of a matrix-vector product."""

    rows: int  # rows of the weight matrix per program
    columns: int  # columns per load
    warps: int


class MatmulTile(NamedTuple):
    """Shape of a program (thread block) of a matrix product."""

    rows: int  # rows of the weight matrix per program
    columns: int  # columns per pipeline stage
    stages: int  # pipeline stages in flight
    warps: int
    splits: int  # number of equal ranges of columns; each range has its own programs and partial sums


class Conv(NamedTuple):
    """Causal convolution that is applied to the outputs `start` to `stop - 1` of a projection."""

    state: Tensor  # [d_conv - 1, b, c], the previous inputs, oldest first
    weight: Tensor  # [d_conv, c]
    bias: Tensor  # [c]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.weight.shape[1]


def supports_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def tile_for(weight: Tensor) -> Tile:
    """Return the tile that is fastest on an H200 for a matrix of this size.

    If the matrix has few rows, all warps of a program share one row.
    """
    rows = weight.shape[0]
    warps = 4 if weight.element_size() == 2 else 8
    return Tile(1, 512, warps) if rows < 1024 else Tile(8 if rows > 16384 else 4, 256, warps)


def matmul_tile_for(weight: Tensor, *, split: bool) -> MatmulTile:
    """Return the tile that is fastest on an H200.

    Args:
        weight: Matrix to multiply by.
        split: Whether the caller adds up partial sums. If so, the columns are split where possible, because a matrix
            with few rows has too few programs to occupy the whole GPU.
    """
    columns, stages = (128, 3) if weight.element_size() == 2 else (32, 2)
    splits = 5 if split and weight.shape[1] % (5 * columns) == 0 else 1
    return MatmulTile(64, columns, stages, 4, splits)


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def num_programs(weight: Tensor, tile: Tile) -> int:
    return -(-weight.shape[0] // tile.rows)


def _vector_constants(x: Tensor, sums: Tensor | None, tile: Tile, pdl: bool) -> dict[str, int | bool]:
    num_sums = 0 if sums is None else sums.shape[1]
    return {
        "BATCH": x.shape[0],
        "K": x.shape[1],
        "SUMS": num_sums,
        "SUMS_PADDED": next_power_of_2(max(num_sums, 1)),
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.columns,
        "PDL": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
    }


def project(
    weight: Tensor, x: Tensor, sums: Tensor | None, eps: float, out: Tensor, conv: Conv | None, tile: Tile, pdl: bool
) -> None:
    """Write weight · x / rms(x) into `out` [b, num_rows].

    With `conv`, the convolution and silu are applied to the outputs `conv.start` to `conv.stop - 1`. Without `sums`, x
    is not divided by its rms.
    """
    decode_projections.project_kernel[(num_programs(weight, tile),)](
        weight,
        x,
        sums,
        out,
        conv and conv.state,
        conv and conv.weight,
        conv and conv.bias,
        weight.shape[0],
        eps,
        CONV_START=conv.start if conv else 0,
        CONV_STOP=conv.stop if conv else 0,
        TAPS=conv.weight.shape[0] if conv else 1,
        X_STRIDE=x.stride(0),
        **_vector_constants(x, sums, tile, pdl),
    )


def project_residual(
    weight: Tensor,
    x: Tensor,
    sums: Tensor | None,
    eps: float,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    out_sums: Tensor,
    tile: Tile,
    pdl: bool,
) -> None:
    """Add weight · x / rms(x) to `residual` in place.

    Also write residual · norm_weight into `normed`, and the partial sums of squares of the residual into `out_sums`.
    Without `sums`, x is not divided by its rms.
    """
    decode_projections.project_residual_kernel[(num_programs(weight, tile),)](
        weight,
        x,
        sums,
        residual,
        norm_weight,
        normed,
        out_sums,
        weight.shape[0],
        eps,
        **_vector_constants(x, sums, tile, pdl),
    )


def project_vocabulary(
    weight: Tensor,
    x: Tensor,
    sums: Tensor,
    eps: float,
    logits: Tensor,
    best_value: Tensor,
    best_index: Tensor,
    tile: Tile,
    pdl: bool,
) -> None:
    """Write the logits weight · x / rms(x).

    Each program computes the logits of some rows of `weight`. For each sequence, it also writes the largest of these
    logits into `best_value` [b, programs] and its index into `best_index`, from which `argmax` chooses the next token.
    """
    decode_projections.project_vocabulary_kernel[(num_programs(weight, tile),)](
        weight,
        x,
        sums,
        logits,
        best_value,
        best_index,
        weight.shape[0],
        eps,
        **_vector_constants(x, sums, tile, pdl),
    )


def matmul(weight: Tensor, x: Tensor, out: Tensor, conv: Conv | None, tile: MatmulTile, pdl: bool) -> None:
    """Write weight · x into `out` [splits, b, num_rows], as one partial sum per split of the columns.

    If there is only one split, `conv` can be given: the convolution and silu are then applied as in `project`.
    """
    num_rows, width = weight.shape
    splits, batch, _ = out.shape
    block = min(max(next_power_of_2(batch), 16), 128)
    decode_projections.matmul_kernel[(-(-num_rows // tile.rows), splits, -(-batch // block))](
        TensorDescriptor.from_tensor(weight, [tile.rows, tile.columns]),
        TensorDescriptor.from_tensor(x, [block, tile.columns]),
        out,
        conv and conv.state,
        conv and conv.weight,
        conv and conv.bias,
        num_rows,
        batch,
        K=width,
        SPLITS=splits,
        CONV_START=conv.start if conv else 0,
        CONV_STOP=conv.stop if conv else 0,
        TAPS=conv.weight.shape[0] if conv else 1,
        BATCH=block,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        STAGES=tile.stages,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def mamba2_block(head_dim: int) -> int:
    """Return the number of channels that one program of `mamba2_update` processes. They belong to the same head."""
    return min(head_dim, 16)


def mamba2_update(
    zxbcdt: Tensor,
    state: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    y: Tensor,
    sums: Tensor,
    pdl: bool,
) -> None:
    """Advance the states [b, h, p, k] by one position.

    Write y · silu(z) · norm_weight into `y`, and the partial sums of squares of y · silu(z) into `sums`.
    """
    batch, heads, head_dim, d_state = state.shape
    block = heads * head_dim // sums.shape[1]
    decode_states.mamba2_update_kernel[(sums.shape[1], batch)](
        zxbcdt,
        state,
        A,
        D,
        dt_bias,
        norm_weight,
        y,
        sums,
        HEADS=heads,
        P=head_dim,
        STATE=d_state,
        BLOCK_P=block,
        PDL=pdl,
        num_warps=1 if state.element_size() == 2 and batch > MAX_VECTORS else 4,
        launch_pdl=pdl,
    )


def mamba1_update(
    xz: Tensor,
    dbc: Tensor,
    dt: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    state: Tensor,
    y: Tensor,
    pdl: bool,
) -> None:
    """Advance the states [b, c, k] by one position, and write y · silu(z) into `y`.

    If `dt` is None, the kernel computes it from `dbc` and `dt_weight`.
    """
    batch, channels, d_state = state.shape
    rank = dt_weight.shape[1]
    block = 16 if batch <= MAX_VECTORS else 128
    decode_states.mamba1_update_kernel[(-(-channels // block), batch)](
        xz,
        dbc,
        dt,
        dt_weight,
        dt_bias,
        A,
        D,
        state,
        y,
        channels,
        RANK=rank,
        RANK_PADDED=next_power_of_2(rank),
        STATE=d_state,
        BLOCK_C=block,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def embed(
    tokens: Tensor,
    embedding: Tensor,
    norm_weight: Tensor,
    residual: Tensor,
    normed: Tensor,
    sums: Tensor | None,
    eps: float,
) -> None:
    """Embed the tokens into `residual`, and write residual · norm_weight into `normed`.

    With `sums`, also write the partial sums of squares of the residual, from which the next kernel computes the rms.
    Without `sums`, divide `normed` by the rms here.
    """
    width = embedding.shape[1]
    num_sums = 1 if sums is None else sums.shape[1]
    decode_states.embed_kernel[(tokens.shape[0],)](
        tokens,
        embedding,
        norm_weight,
        residual,
        normed,
        sums,
        width,
        eps,
        SUMS=num_sums,
        SUMS_PADDED=next_power_of_2(num_sums),
        NORMALISE=sums is None,
        BLOCK=next_power_of_2(width),
        num_warps=8,
    )


def add_norm(
    branch: Tensor,
    sums: Tensor | None,
    sums_width: int,
    branch_eps: float,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    eps: float,
    pdl: bool,
) -> None:
    """Add the output of a mixer to `residual` in place, and write the RMSNorm of the residual into `normed`.

    The output is the product of out_proj with an input vector. Since the product was computed without the gated norm,
    the output is divided by the rms of the input vector here.

    Args:
        branch: Output of the mixer as partial sums [splits, b, d].
        sums: Partial sums of squares of the input vector; None: there is no gated norm to apply.
        sums_width: Number of values of the input vector.
        branch_eps: Epsilon of the rms of the input vector.
        eps: Epsilon of the RMSNorm that is written.
    """
    splits, batch, width = branch.shape
    num_sums = 0 if sums is None else sums.shape[1]
    decode_states.add_norm_kernel[(batch,)](
        branch,
        sums,
        residual,
        norm_weight,
        normed,
        width,
        branch_eps,
        eps,
        SPLITS=splits,
        WIDTH=sums_width,
        SUMS=num_sums,
        SUMS_PADDED=next_power_of_2(max(num_sums, 1)),
        BLOCK=next_power_of_2(width),
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )


def argmax(values: Tensor, indices: Tensor | None, tokens: Tensor, pdl: bool) -> None:
    """Write the index of the first maximum of each row of `values` into `tokens` [b].

    With `indices`, which has the shape of `values`, write the corresponding entry of `indices` instead of the index.
    """
    decode_states.argmax_kernel[(values.shape[0],)](
        values, indices, tokens, values.shape[1], BLOCK=4096, PDL=pdl, num_warps=8, launch_pdl=pdl
    )
