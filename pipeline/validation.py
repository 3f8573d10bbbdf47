"""Losses on held-out shards while training. The weights, and so the rest of the training, stay as they are."""

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
    """The first global batches that a training on the held-out shards would see: the same ones every time.

    Raises: UserError if the shards do not fit the recipe's model.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        assert recipe.evaluate.shards is not None
        # It is short, and a loading process would take longer to start.
        data = replace(recipe.data, shards=recipe.evaluate.shards, epochs=1, workers=0)
        self.recipe = recipe
        try:
            self.data = TrainData(replace(recipe, data=data, steps=None), ranks)
        except UserError as error:
            raise UserError(str(error).replace("data.shards", "evaluate.shards", 1)) from None
        self.num_batches = min(-(-recipe.evaluate.samples // recipe.optim.global_batch), self.data.plan.steps_per_epoch)

    def due(self, step: int) -> bool:
        return step % self.recipe.evaluate.every_steps == 0

    @torch.no_grad()
    def losses(self, engine: Engine, towers: Towers) -> dict[str, Any]:
        """Means over the samples, by the keys of docs/metrics.md. Every rank must call it."""
        sums = LossAccumulator(len(self.data.sources.names), engine.device)
        batches = []
        engine.eval()
        for batch in islice(self.data.from_step(0), self.num_batches):
            numbers = batch.sources.rows.to(engine.device)
            for micro_batch, sources in zip(batch.micro_batches, numbers, strict=True):
                sums.add(*row_losses(engine, towers, self.recipe, micro_batch.to(engine.device)), sources)
            batches.append(replace(batch, micro_batches=[]))
        engine.train()
        text, align, *by_source = sums.reduce()
        return self._means(batches, text, align, by_source)

    def _means(self, batches: list[GlobalBatch], text: float, align: float, by_source: list[float]) -> dict[str, Any]:
        samples, images = sum(batch.samples for batch in batches), sum(batch.images for batch in batches)
        of_source = np.sum([text_weights(self.recipe, batch) for batch in batches], axis=0)
        named = zip(self.data.sources.names, by_source, of_source, strict=True)
        return {
            "heldout/loss/text": text / max(1, of_source.sum()),
            "heldout/loss/align": align / images if images and self.recipe.config.alignment else None,
            **{f"heldout/loss/text/{name}": total / weight if weight else None for name, total, weight in named},
            "heldout/samples": samples,
        }
