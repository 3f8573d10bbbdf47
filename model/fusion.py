"""Multi-scale feature fusion (EMMA Eq. 7-8), which combines several states of each patch into one.

The states are those of the language model's tapped layers, and its final state. They are passed as the tuple `levels`,
in the order of the layers, with the final state last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EmmaConfig
from model.mamba import MIXERS, RMSNorm


class CrossAttention(nn.Module):
    """Multi-head attention in which each patch of `x` attends to the same patch and all earlier patches of `y`."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [b, n, d], [b, n, d] -> [b, n, d]
        q = self._heads(self.q_proj(x))
        k, v = map(self._heads, self.kv_proj(y).chunk(2, -1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # [b, n, d] -> [b, h, n, p]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FusionBlock(nn.Module):
    """Fuse two states: x̂ = x + attention(x, y), then x̂ + mamba(x̂) (EMMA Eq. 8).

    Differs from the paper, which shows no norm here: RMSNorm is applied before the attention and before Mamba, as in
    every Mamba block, because the fused states have different scales.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        assert config.alignment is not None
        head_dim, mamba = config.alignment.head_dim, config.mamba_blocks(config.alignment.decoder_kind)
        self.norm_x, self.norm_y, self.norm = (RMSNorm(mamba.d_model, mamba.norm_eps) for _ in range(3))
        self.attention = CrossAttention(mamba.d_model, head_dim)
        self.mixer = MIXERS[mamba.kind](mamba)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [b, n, d], [b, n, d] -> [b, n, d]
        x = x + self.attention(self.norm_x(x)[0], self.norm_y(y)[0])
        return x + self.mixer(self.norm(x)[0])


class Cascade(nn.Module):
    """Start with the shallowest state, and fuse each deeper state into the result in turn (EMMA Eq. 7)."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        assert config.alignment is not None
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in config.alignment.taps)

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:  # shallow to final, [b, n, d] each -> [b, n, d]
        x, *deeper = levels
        for block, y in zip(self.blocks, deeper, strict=True):
            x = block(x, y)
        return x


class Concatenation(nn.Module):
    """Fuse as the paper's published code does.

    One matrix mixes the concatenated levels of each patch. The result is cut into as many slices as there are levels,
    and learned queries, one per patch, attend to each slice in turn.

    Differs from the published code in two ways. Each query is initialised with the sine-cosine position code of its
    patch, whereas the published code initialises all queries equally. Queries and keys are both in raster order, so a
    query attends to the patches up to its own, whereas in the published code it attends to whole rows of patches.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        assert config.alignment is not None
        width, num_levels = config.llm.d_model, len(config.alignment.taps) + 1
        self.norms = nn.ModuleList(RMSNorm(width, config.llm.norm_eps) for _ in range(num_levels))
        self.mix = nn.Linear(num_levels * width, num_levels * width)
        self.queries = nn.Embedding(config.vision.num_patches, width)
        with torch.no_grad():
            self.queries.weight.copy_(sine_cosine(config.vision.grid, width))
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(num_levels))

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:  # shallow to final, [b, n, d] each -> [b, n, d]
        normed = [norm(level)[0] for norm, level in zip(self.norms, levels, strict=True)]
        slices = self.mix(torch.cat(normed, -1)).chunk(len(levels), -1)
        patches = torch.arange(self.queries.num_embeddings, device=slices[0].device)
        x = self.queries(patches).expand_as(slices[0])
        for block, y in zip(self.blocks, slices, strict=True):
            x = block(x, y)
        return x


class FinalOnly(nn.Module):
    """Return the final state unchanged, without fusion."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:
        return levels[-1]


FUSIONS: dict[str, type[nn.Module]] = {"cascade": Cascade, "concat": Concatenation, "none": FinalOnly}


def sine_cosine(grid: int, width: int) -> Tensor:  # [n, width]
    """Return the position code of each patch, in raster order.

    The first half of the channels encodes the row of the patch, the second half its column.
    """
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # [grid, width / 4]
    code = torch.cat([angles.sin(), angles.cos()], -1)  # [grid, width / 2]
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
