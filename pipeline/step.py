"""One optimizer step over a global batch, and the single all-reduce that turns its losses into a report.

A loss is summed over the whole global batch and divided by totals of the whole global batch. The sum and the totals do
not depend on how the batch is split over ranks and micro-batches, so the update does not depend on it either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from model.alignment import align_target
from model.config import EmmaConfig
from model.emma import Losses
from model.vision import Towers
from pipeline.data.batch import GlobalBatch, MicroBatch
from pipeline.engine import Engine
from pipeline.recipe import Recipe
from pipeline.zero import clear_gradients, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Divisors that turn the loss sums of a global batch into means. Each is at least 1."""

    text: int  # supervised tokens or samples, as `loss.text` says
    images: int


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests of one rank to all ranks. After the reduction, a flag is set if any rank has set it."""

    stop: bool = False  # save, then stop
    save: bool = False
    writing: bool = False  # do not publish the checkpoint yet, because this rank is still writing its files


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Time that one rank spent on parts of a step, in seconds."""

    data_wait_s: float = 0.0  # waiting for this step's data
    towers_s: float = 0.0  # vision towers in the previous step
    gc_s: float = 0.0  # garbage collection after the previous step


class LossAccumulator:
    """Sums of this rank's losses in fp64, kept on the device so that adding to them does not block the host."""

    def __init__(self, num_sources: int, device: torch.device):
        self.sums = torch.zeros(2 + num_sources, dtype=torch.float64, device=device)  # text, alignment, text by source

    def add(self, text: torch.Tensor, align: torch.Tensor, sources: torch.Tensor) -> None:
        """Add the losses of a micro-batch's rows.

        Args:
            text, align: Losses, [b] each.
            sources: Index of each row's source, [b].
        """
        text = text.detach().double()
        self.sums[0] += text.sum()
        self.sums[1] += align.detach().double().sum()
        self.sums[2:].index_add_(0, sources, text)

    def reduce(self) -> npt.NDArray[np.float64]:
        """Return the sums over all ranks. Must be called on every rank."""
        dist.all_reduce(self.sums)
        return self.sums.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Loss sums of one optimizer step on this rank, with the divisors and weights that `reduce_step` needs."""

    sums: torch.Tensor  # [2 + sources] fp64 on the device, as in LossAccumulator
    totals: Totals
    align_weight: float
    has_align: bool  # False for a step without images, or a model without an alignment loss
    grad_norm: float | None  # over all ranks, before clipping


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Losses of one optimizer step over all ranks, with requests and timings. It is equal on every rank."""

    text: float
    align: float | None  # None in a text-only step
    total: float
    grad_norm: float  # before clipping
    text_by_source: npt.NDArray[np.float64]  # [sources] sums of the text loss, to be divided by `text_weights`
    requests: Requests  # a flag is set if any rank has set it
    timings: list[Timings]  # by rank

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.grad_norm)


def optimizer_step(engine: Engine, towers: Towers, recipe: Recipe, batch: GlobalBatch, lr: float) -> LossSums:
    """Train on one global batch. Must be called on every rank, with its own slice of the same batch."""
    set_learning_rate(engine, lr)
    clear_gradients(engine)
    totals = step_totals(recipe, batch)
    losses = LossAccumulator(len(batch.sources.samples), engine.device)
    sources = batch.sources.rows.to(engine.device)
    for micro_batch, row_sources in zip(batch.micro_batches, sources, strict=True):
        text, align = row_losses(engine, towers, recipe, micro_batch.to(engine.device))
        losses.add(text, align, row_sources)
        loss = text.sum() / totals.text + recipe.align_weight * align.sum() / totals.images
        # DeepSpeed skips the update only if a gradient is not finite. An infinite loss can have finite gradients, so
        # this factor makes them NaN too.
        loss = loss * (1 + 0 * loss.detach())
        # DeepSpeed averages over ranks and micro-batches, but this loss is a sum over them.
        engine.backward(loss * len(batch.micro_batches) * dist.get_world_size())
        engine.step()
    return LossSums(
        sums=losses.sums,
        totals=totals,
        align_weight=recipe.align_weight,
        has_align=bool(batch.images) and recipe.config.alignment is not None,
        grad_norm=engine.get_global_grad_norm(),
    )


def reduce_step(losses: LossSums, requests: Requests, timings: Timings) -> StepReport:
    """Sum a step's losses over the ranks, and exchange requests and timings, in a single all-reduce.

    Must be called on every rank. It blocks until the device has finished the step.
    """
    seconds = torch.zeros(dist.get_world_size(), len(astuple(timings)), dtype=torch.float64)
    seconds[dist.get_rank()] = torch.tensor(astuple(timings), dtype=torch.float64)
    flags = torch.tensor(astuple(requests), dtype=torch.float64)
    from_host = torch.cat([flags, seconds.flatten()])
    # Copy without blocking, because otherwise the host would wait for the device here as well as below.
    values = torch.cat([losses.sums, from_host.to(losses.sums.device, non_blocking=True)])
    dist.all_reduce(values)
    sums, flags, seconds = values.cpu().split([len(losses.sums), len(flags), seconds.numel()])
    text, align = float(sums[0]) / losses.totals.text, float(sums[1]) / losses.totals.images
    stop, save, writing = (flags > 0).tolist()
    by_rank = seconds.view(dist.get_world_size(), -1).tolist()
    return StepReport(
        text=text,
        align=align if losses.has_align else None,
        total=text + losses.align_weight * align,
        grad_norm=float(losses.grad_norm) if losses.grad_norm is not None else math.nan,
        text_by_source=sums[2:].numpy(),
        requests=Requests(stop=stop, save=save, writing=writing),
        timings=[Timings(data_wait_s=wait, towers_s=towers, gc_s=gc) for wait, towers, gc in by_rank],
    )


def row_losses(
    model: Callable[..., Losses], towers: Towers, recipe: Recipe, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text and the alignment loss of each row, [b] each. Filler rows have zero loss."""
    losses = forward(model, towers, recipe.config, batch)
    text = losses.text_nll
    if recipe.loss.text == "sample":
        text = text / losses.text_tokens.clamp(min=1)
    align = losses.align_error if losses.align_error is not None else torch.zeros_like(losses.text_nll)
    return text * batch.real, align * batch.real


def forward(model: Callable[..., Losses], towers: Towers, config: EmmaConfig, batch: MicroBatch) -> Losses:
    """Run the frozen towers, then the model. The towers stay outside the engine, which would shard them."""
    if batch.pixels is None:
        return model(batch.tokens, batch.targets)
    features = towers(batch.pixels)
    target = align_target(config, towers, batch.pixels, features).values if config.alignment else None
    return model(batch.tokens, batch.targets, features, target)


def step_totals(recipe: Recipe, batch: GlobalBatch) -> Totals:
    """Compute a step's divisors. No collective is needed, because every rank has the index of all samples."""
    return Totals(text=max(1, int(text_weights(recipe, batch).sum())), images=max(1, batch.images))


def text_weights(recipe: Recipe, batch: GlobalBatch) -> npt.NDArray[np.int64]:
    """Return the divisor of each source's text loss: its supervised tokens or its samples in the batch. [sources]"""
    return batch.sources.supervised_tokens if recipe.loss.text == "token" else batch.sources.samples
