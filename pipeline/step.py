"""One optimizer step: every micro-batch forward and backward, then one update.

The loss is a sum over the whole global batch divided by totals of the whole global batch. Both do not depend on how the
batch was split over ranks and micro-batches, and so neither does the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.alignment import align_target
from model.config import EmmaConfig
from model.emma import Losses
from model.vision import Towers
from pipeline.data import GlobalBatch, MicroBatch
from pipeline.engine import clear_gradients
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Totals:
    """What the sums over a global batch are divided by."""

    text: float
    images: float


@dataclass(frozen=True)
class StepReport:
    """Of the whole step over all ranks. `align` is None in a text-only step, `grad_norm` is before clipping.

    `stop` and `save` tell that some rank saw a request; all ranks read the same values here.
    """

    text: float
    align: float | None
    total: float
    grad_norm: float
    stop: bool
    save: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.grad_norm)


def optimizer_step(
    engine: Any,
    towers: Towers,
    recipe: Recipe,
    batch: GlobalBatch,
    lr: float,
    requests: Sequence[bool] = (False, False),
) -> StepReport:
    """Train on one global batch. Every rank must call it, with its own slice of the same batch.

    requests: (stop, save) as this rank sees them; they travel in the reduction that is made anyway.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    clear_gradients(engine)
    totals = step_totals(recipe, batch)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    sums[2:] = torch.tensor(requests, dtype=torch.float64)
    for micro_batch in batch.micro_batches:
        losses = forward(engine, towers, recipe.config, micro_batch.to(engine.device))
        text, align = loss_sums(losses, micro_batch.real.to(engine.device), recipe.loss.text)
        sums[0] += text.detach()
        sums[1] += align.detach()
        loss = text / totals.text + recipe.align_weight * align / totals.images
        # DeepSpeed averages over ranks and micro-batches; ours is a sum over them.
        engine.backward(loss * len(batch.micro_batches) * torch.distributed.get_world_size())
        engine.step()
    return _report(engine, recipe, batch, totals, sums)


def forward(engine: Any, towers: Towers, config: EmmaConfig, batch: MicroBatch) -> Losses:
    """The frozen towers outside the engine, which must not see them, then the model inside."""
    if batch.pixels is None:
        return engine(batch.tokens, batch.targets)
    features = towers(batch.pixels)
    target = align_target(config, towers, batch.pixels, features).values if config.alignment else None
    return engine(batch.tokens, batch.targets, features, target)


def loss_sums(losses: Losses, real: torch.Tensor, text_mean: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the rows of a micro-batch; filler rows (`real` [b] is False) count for nothing."""
    text = losses.text_nll
    if text_mean == "sample":
        text = text / losses.text_tokens.clamp(min=1)
    align = losses.align_error if losses.align_error is not None else torch.zeros_like(losses.text_nll)
    return (text * real).sum(), (align * real).sum()


def step_totals(recipe: Recipe, batch: GlobalBatch) -> Totals:
    """Known from the index before any forward pass, hence without a collective."""
    text = batch.supervised_tokens if recipe.loss.text == "token" else batch.samples
    return Totals(text=max(1, text), images=max(1, batch.images))


def _report(engine: Any, recipe: Recipe, batch: GlobalBatch, totals: Totals, sums: torch.Tensor) -> StepReport:
    torch.distributed.all_reduce(sums)
    text_sum, align_sum, stop, save = sums.tolist()
    text, align = text_sum / totals.text, align_sum / totals.images
    has_align = bool(batch.images) and recipe.config.alignment is not None
    grad_norm = engine.get_global_grad_norm()
    return StepReport(
        text=text,
        align=align if has_align else None,
        total=text + recipe.align_weight * align,
        grad_norm=float(grad_norm) if grad_norm is not None else math.nan,
        stop=stop > 0,
        save=save > 0,
    )
