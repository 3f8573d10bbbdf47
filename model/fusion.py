"""Multi-scale feature fusion (EMMA Eq. 7-8): combine tapped states and the final state into one state per patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EmmaConfig
from model.mamba import MIXERS, RMSNorm


class CrossAttention(nn.Module):
    """Multi-head attention in which each patch of `x` attends to the same and earlier patches of `y`."""

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

    Differs: RMSNorm before the attention and before Mamba, as in every Mamba block, because the fused states have
    different scales. The paper shows no norm.
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
    """Start from the shallowest state and fuse each deeper one into it, the final state last (EMMA Eq. 7)."""

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
    """Fuse as the public code does: mix all levels by one matrix, then let learned queries attend to each slice of it.

    Differs: each query starts at the sine-cosine position code of its patch, where the public code's are all equal.
    Queries and keys are in raster order, and a query sees patches up to its own, not up to the end of the row.
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
    """Return position codes in raster order. Half of the channels encode the row, the other half the column."""
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # [grid, width / 4]
    code = torch.cat([angles.sin(), angles.cos()], -1)  # [grid, width / 2]
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
