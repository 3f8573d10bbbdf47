"""Validation during training: losses on held-out shards."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from model.vision import Towers
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.engine import Engine
from pipeline.recipe import Recipe
from pipeline.step import LossAccumulator, row_losses, text_weights


class Validation:
    """Compute the losses on `evaluate.samples` held-out samples, the same ones each time.

    The samples are the first global batches that a training run on the held-out shards would process. Validation does
    not change the weights, so a run with validation computes the same bits as a run without.

    Raises: UserError if the shards do not match the recipe's model.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        assert recipe.evaluate.shards is not None
        # Starting DataLoader workers would take longer than a validation.
        data = replace(recipe.data, shards=recipe.evaluate.shards, epochs=1, workers=0)
        self.recipe = recipe
        try:
            self.data = TrainData(replace(recipe, data=data, steps=None), ranks)
        except UserError as error:
            raise UserError(str(error).replace("data.shards", "evaluate.shards", 1)) from None
        self.num_batches = min(-(-recipe.evaluate.samples // recipe.optim.global_batch), self.data.plan.steps_per_epoch)

    def due(self, step: int) -> bool:
        """Return whether the recipe asks for a validation after this step."""
        return step % self.recipe.evaluate.every_steps == 0

    @torch.no_grad()
    def losses(self, engine: Engine, towers: Towers) -> dict[str, Any]:
        """Return the mean losses, with the keys that docs/metrics.md lists. Must be called on every rank."""
        losses = LossAccumulator(len(self.data.sources.names), engine.device)
        batches = []
        engine.eval()
        for batch in islice(self.data.from_step(0), self.num_batches):
            sources = batch.sources.rows.to(engine.device)
            for micro_batch, row_sources in zip(batch.micro_batches, sources, strict=True):
                text, align = row_losses(engine, towers, self.recipe, micro_batch.to(engine.device))
                losses.add(text, align, row_sources)
            batches.append(replace(batch, micro_batches=[]))
        engine.train()
        text_sum, align_sum, *sums_by_source = losses.reduce()
        return self._means(batches, text_sum=text_sum, align_sum=align_sum, sums_by_source=sums_by_source)

    def _means(
        self, batches: list[GlobalBatch], *, text_sum: float, align_sum: float, sums_by_source: list[float]
    ) -> dict[str, Any]:
        """Divide the loss sums by their weights. A source without samples has no mean."""
        images = sum(batch.images for batch in batches)
        weights = np.sum([text_weights(self.recipe, batch) for batch in batches], axis=0)
        by_source = zip(self.data.sources.names, sums_by_source, weights, strict=True)
        return {
            "heldout/loss/text": text_sum / max(1, weights.sum()),
            "heldout/loss/align": align_sum / images if images and self.recipe.config.alignment else None,
            **{f"heldout/loss/text/{name}": total / weight if weight else None for name, total, weight in by_source},
            "heldout/samples": sum(batch.samples for batch in batches),
        }
