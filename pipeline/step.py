"""One optimizer step: every micro-batch forward and backward, then one update.

The loss is a sum over the whole global batch divided by totals of the whole global batch. Both do not depend on how the
batch was split over ranks and micro-batches, and so neither does the update. One reduction over the ranks carries the
losses, the requests from outside, and what each rank has waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.alignment import align_target
from model.config import EmmaConfig
from model.emma import Losses
from model.vision import Towers
from pipeline.data.loader import GlobalBatch, MicroBatch
from pipeline.engine import Engine
from pipeline.recipe import Recipe
from pipeline.zero import clear_gradients


@dataclass(frozen=True)
class Totals:
    """What the sums over a global batch are divided by."""

    text: float
    images: float


@dataclass(frozen=True)
class Requests:
    """What this rank was asked for from outside, and whether it is still writing a checkpoint."""

    stop: bool = False
    save: bool = False
    writing: bool = False


@dataclass(frozen=True)
class Seconds:
    """What one rank spent: waiting for this step's data, then on the step before: towers and garbage."""

    data_wait: float = 0.0
    towers: float = 0.0
    gc: float = 0.0


NOTHING_ASKED, NOTHING_SPENT = Requests(), Seconds()


@dataclass(frozen=True)
class StepReport:
    """Of the whole step over all ranks. `align` is None in a text-only step, `grad_norm` is before clipping.

    `stop` and `save` tell that some rank saw a request, `writing` that some rank has a checkpoint to write; all ranks
    read the same values here.
    """

    text: float
    align: float | None
    total: float
    grad_norm: float
    stop: bool
    save: bool
    writing: bool
    text_by_source: npt.NDArray[np.float64]  # [sources] sums, to be divided by the source's share of the totals
    seconds: list[Seconds]  # of each rank

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.grad_norm)


class StepSums:
    """The vector of a step's one reduction: this rank's losses, requests and seconds, then those of all ranks.

    It is filled on the device, where the host need not wait for it.
    """

    def __init__(
        self, num_sources: int, device: torch.device, requests: Requests = NOTHING_ASKED, spent: Seconds = NOTHING_SPENT
    ):
        seconds = torch.zeros(torch.distributed.get_world_size(), len(astuple(spent)), dtype=torch.float64)
        seconds[torch.distributed.get_rank()] = torch.tensor(astuple(spent), dtype=torch.float64)
        asked = torch.tensor(astuple(requests), dtype=torch.float64)
        losses = torch.zeros(2 + num_sources, dtype=torch.float64)
        self.sizes = [len(losses), len(asked), seconds.numel()]
        self.values = torch.cat([losses, asked, seconds.flatten()]).to(device)

    def add(self, text: torch.Tensor, align: torch.Tensor, sources: torch.Tensor | None) -> None:
        """Of the rows of a micro-batch, [b] each; `sources` are their numbers."""
        losses = self.values[: self.sizes[0]]
        text = text.detach().double()
        losses[0] += text.sum()
        losses[1] += align.detach().double().sum()
        if sources is not None:
            losses[2:].index_add_(0, sources, text)

    def reduce(self) -> tuple[npt.NDArray[np.float64], Requests, list[Seconds]]:
        """Losses (text, align, text by source) of all ranks, what any rank was asked, and each rank's seconds."""
        torch.distributed.all_reduce(self.values)
        losses, asked, seconds = self.values.cpu().split(self.sizes)
        ranks = seconds.view(torch.distributed.get_world_size(), -1).tolist()
        return losses.numpy(), Requests(*(asked > 0).tolist()), [Seconds(*each) for each in ranks]


def optimizer_step(
    engine: Engine,
    towers: Towers,
    recipe: Recipe,
    batch: GlobalBatch,
    lr: float,
    requests: Requests = NOTHING_ASKED,
    spent: Seconds = NOTHING_SPENT,
) -> StepReport:
    """Train on one global batch. Every rank must call it, with its own slice of the same batch."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    clear_gradients(engine)
    totals = step_totals(recipe, batch)
    sums = StepSums(len(batch.sources.samples), engine.device, requests, spent)
    sources = batch.sources.rows.to(engine.device)
    for micro_batch, numbers in zip(batch.micro_batches, sources, strict=True):
        text, align = row_losses(engine, towers, recipe, micro_batch.to(engine.device))
        sums.add(text, align, numbers)
        loss = text.sum() / totals.text + recipe.align_weight * align.sum() / totals.images
        # DeepSpeed looks at gradients alone, which can be finite where the loss is not; it must not update then either.
        loss = loss * (1 + 0 * loss.detach())
        # DeepSpeed averages over ranks and micro-batches; ours is a sum over them.
        engine.backward(loss * len(batch.micro_batches) * torch.distributed.get_world_size())
        engine.step()
    return _report(engine, recipe, batch, totals, sums)


def row_losses(
    model: Callable[..., Losses], towers: Towers, recipe: Recipe, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and alignment loss of each row, [b] each; those of filler rows are zero."""
    losses = forward(model, towers, recipe.config, batch)
    text = losses.text_nll
    if recipe.loss.text == "sample":
        text = text / losses.text_tokens.clamp(min=1)
    align = losses.align_error if losses.align_error is not None else torch.zeros_like(losses.text_nll)
    return text * batch.real, align * batch.real


def forward(model: Callable[..., Losses], towers: Towers, config: EmmaConfig, batch: MicroBatch) -> Losses:
    """The frozen towers outside the engine, which must not see them, then the model inside."""
    if batch.pixels is None:
        return model(batch.tokens, batch.targets)
    features = towers(batch.pixels)
    target = align_target(config, towers, batch.pixels, features).values if config.alignment else None
    return model(batch.tokens, batch.targets, features, target)


def step_totals(recipe: Recipe, batch: GlobalBatch) -> Totals:
    """Known from the index before any forward pass, hence without a collective."""
    return Totals(text=max(1, int(text_weights(recipe, batch).sum())), images=max(1, batch.images))


def text_weights(recipe: Recipe, batch: GlobalBatch) -> npt.NDArray[np.int64]:
    """What a global batch's text losses are means over, by source: supervised tokens or samples. [sources]"""
    return batch.sources.supervised_tokens if recipe.loss.text == "token" else batch.sources.samples


def _report(engine: Engine, recipe: Recipe, batch: GlobalBatch, totals: Totals, sums: StepSums) -> StepReport:
    losses, asked, seconds = sums.reduce()
    text, align = float(losses[0]) / totals.text, float(losses[1]) / totals.images
    has_align = bool(batch.images) and recipe.config.alignment is not None
    grad_norm = engine.get_global_grad_norm()
    return StepReport(
        text=text,
        align=align if has_align else None,
        total=text + recipe.align_weight * align,
        grad_norm=float(grad_norm) if grad_norm is not None else math.nan,
        stop=asked.stop,
        save=asked.save,
        writing=asked.writing,
        text_by_source=losses[2:],
        seconds=seconds,
    )
