"""Launch the Triton kernels of a decode step on preallocated tensors.

Every function writes into the buffers that it is given, so that a CUDA graph can replay the launches. The references
are in `model.kernels.decode_reference`, under the same names. Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels import decode_projections, decode_states

MAX_VECTORS = 2  # sequences up to which matrix-vector products beat matrix products


class Tile(NamedTuple):
    """Shape of one program of a matrix-vector product: rows, columns per load, warps."""

    rows: int
    columns: int
    warps: int


class MatmulTile(NamedTuple):
    """Shape of one program of a matrix product: rows, columns per stage, stages in flight, warps; splits of K."""

    rows: int
    columns: int
    stages: int
    warps: int
    splits: int


class Conv(NamedTuple):
    """The convolution that follows rows `start` to `stop - 1` of a projection."""

    state: Tensor  # [taps - 1, b, c], oldest input first
    weight: Tensor  # [taps, c]
    bias: Tensor  # [c]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.weight.shape[1]


def supports_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def tile_for(weight: Tensor) -> Tile:
    """The fastest tile on an H200 for a matrix of this size. Every warp holds whole rows, or one row is shared."""
    rows = weight.shape[0]
    warps = 4 if weight.element_size() == 2 else 8
    return Tile(1, 512, warps) if rows < 1024 else Tile(8 if rows > 16384 else 4, 256, warps)


def matmul_tile_for(weight: Tensor, *, split: bool) -> MatmulTile:
    """The fastest tile on an H200. Few rows do not occupy the GPU: the columns are split, where the caller can add."""
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
    """Write weight · x / rms(x) into `out` [b, n], with the convolution and silu applied to its rows."""
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
    """Add weight · x / rms(x) to the residual; write its product with `norm_weight` and its partial squares."""
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
    """Write the logits, and the value and index of the largest logit of every program's rows."""
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
    """Write weight · x as partial sums into `out` [splits, b, n]; with one split, apply the convolution and silu."""
    n, k = weight.shape
    splits, batch, _ = out.shape
    block = min(max(next_power_of_2(batch), 16), 128)
    decode_projections.matmul_kernel[(-(-n // tile.rows), splits, -(-batch // block))](
        TensorDescriptor.from_tensor(weight, [tile.rows, tile.columns]),
        TensorDescriptor.from_tensor(x, [block, tile.columns]),
        out,
        conv and conv.state,
        conv and conv.weight,
        conv and conv.bias,
        n,
        batch,
        K=k,
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
    """Values of a head per program of `mamba2_update`."""
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
    """Advance the states [b, h, p, k]; write y · silu(z) · norm_weight and the partial squares of y · silu(z)."""
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
    """Advance the states [b, c, k] and write y · silu(z). `dt` None: computed here from dbc and `dt_weight`."""
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
    """Start a step: embed the tokens. Without `sums` the result is divided by its rms."""
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
    """Sum the branch [splits, b, d], divide it by the rms that `sums` gives, add it to the residual, and normalise."""
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
    """Write the index of the first maximum of each row, looked up in `indices` if given."""
    decode_states.argmax_kernel[(values.shape[0],)](
        values, indices, tokens, values.shape[1], BLOCK=4096, PDL=pdl, num_warps=8, launch_pdl=pdl
    )
