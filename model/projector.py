"""Projector from vision features to the language model's width, and the cross-scan of the features before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EmmaConfig
from model.kernels import dispatch
from model.mamba import initial_dt_bias, mark_no_weight_decay

CROSS_SCAN_STATE = 16


class Projector(nn.Module):
    """MLP of three layers with GELU, like Cobra's `fused-gelu-mlp`. The first layer has four times the vision width."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        width, d_model = config.vision.width, config.llm.d_model
        self.cross_scan = CrossScan(width, config.vision.grid) if config.cross_scan else None
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:  # [b, n, v] -> [b, n, d]
        if self.cross_scan is not None:
            features = features + self.cross_scan(features)
        return self.out(F.gelu(self.reduce(F.gelu(self.expand(features)))))


class CrossScan(nn.Module):
    """Scan the patches in four directions and add up the results, like VMamba's SS2D.

    Differs from SS2D, which has input and output projections, a gate and a convolution. They are left out, because the
    projector's MLP follows.
    """

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scans = nn.ModuleList(DirectedScan(width) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:  # [b, n, v] -> [b, n, v]
        normed = self.norm(features)
        directions = zip(self.scans, self.orders(features.device), strict=True)
        return self.out_norm(sum(scan(normed[:, order])[:, order.argsort()] for scan, order in directions))

    def orders(self, device: torch.device) -> tuple[Tensor, ...]:  # each [n]
        """Return the order of the patches in each direction: along rows, along columns, and the reverse of both."""
        rows = torch.arange(self.grid**2, device=device)
        columns = rows.view(self.grid, self.grid).t().flatten()
        return rows, columns, rows.flip(0), columns.flip(0)


class DirectedScan(nn.Module):
    """Selective scan of Mamba-1 over patches in a given order, without gate and convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rank = -(-width // 16)
        self.x_proj = nn.Linear(width, self.rank + 2 * CROSS_SCAN_STATE, bias=False)
        self.dt_proj = nn.Linear(self.rank, width, bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(width))
        self.A_log = nn.Parameter(torch.arange(1.0, CROSS_SCAN_STATE + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        mark_no_weight_decay(self)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, v] -> [b, n, v]
        dt, B, C = self.x_proj(x).split([self.rank, CROSS_SCAN_STATE, CROSS_SCAN_STATE], -1)
        A = -torch.exp(self.A_log.float())
        dt_bias = self.dt_bias.float()
        return dispatch.selective_scan(x, self.dt_proj(dt), A, B, C, self.D.float(), None, dt_bias)[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DirectedScan:
        super()._apply(fn, recurse)
        mark_no_weight_decay(self)
        return self
