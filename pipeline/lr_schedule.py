"""The learning-rate schedule: linear warm-up, then cosine decay."""

from __future__ import annotations

import math

from pipeline.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based). The cosine would reach zero at `total_steps`.

    Differs from the usual scheduler in that warm-up counts from one, so that the first learning rate is above zero.
    """
    warmup = int(recipe.optim.warmup_ratio * total_steps)
    if step < warmup:
        return recipe.optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return recipe.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
