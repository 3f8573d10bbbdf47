"""Averages over the steps between two log lines: rates, waits and losses by source. docs/metrics.md lists the keys."""

from __future__ import annotations

import time
from statistics import median_low
from typing import Any

import numpy as np

from pipeline.data.batch import GlobalBatch
from pipeline.metrics.throughput import UsefulFlops
from pipeline.recipe import Recipe
from pipeline.step import StepReport, text_weights


class Window:
    """Sum over the steps since the last log line. `close` returns the averages and starts the next window.

    Args:
        sources: names of the data sources, in the order of `StepReport.text_by_source`.
        peak_flops: peak operations per second of all ranks' devices together; None if unknown.
    """

    def __init__(self, recipe: Recipe, sources: list[str], *, peak_flops: float | None):
        self.recipe, self.sources, self.peak_flops = recipe, sources, peak_flops
        self.flops = UsefulFlops(recipe.config)
        self.restart()

    def restart(self) -> None:
        self.began, self.steps, self.excluded = time.monotonic(), 0, {"save": 0.0, "heldout": 0.0}
        self.samples = self.tokens = 0
        self.padding = self.useful_flops = self.data_wait = self.gc = 0.0
        self.towers = np.zeros(1)  # [ranks] after the first step
        self.text, self.text_weights, self.samples_by_source = (np.zeros(len(self.sources)) for _ in range(3))

    def add(self, batch: GlobalBatch, report: StepReport) -> None:
        """Add one step. Count the longest wait of any rank, because all ranks wait for the slowest rank."""
        self.steps += 1
        self.samples += batch.samples
        self.tokens += batch.tokens
        self.padding += batch.padding_ratio
        self.useful_flops += self.flops.of_batch(batch)
        self.data_wait += max(rank.data_wait_s for rank in report.timings)
        self.gc += max(rank.gc_s for rank in report.timings)
        self.towers = self.towers + np.array([rank.towers_s for rank in report.timings])
        self.samples_by_source += batch.sources.samples
        if report.finite:
            self.text += report.text_by_source
            self.text_weights += text_weights(self.recipe, batch)

    def exclude(self, name: str, seconds: float) -> None:
        """Exclude the time of a save or a validation from the step time."""
        self.excluded[name] += seconds

    def close(self) -> dict[str, Any]:
        """Return the values of a log line, and start the next window."""
        seconds = time.monotonic() - self.began - sum(self.excluded.values())
        values = {
            "speed/samples_per_s": self.samples / seconds,
            "speed/tokens_per_s": self.tokens / seconds,
            "speed/mfu": self.useful_flops / (seconds * self.peak_flops) if self.peak_flops else None,
            "time/step_s": seconds / self.steps,
            "time/data_wait_s": self.data_wait / self.steps,
            "time/gc_s": self.gc,
            "time/save_stall_s": self.excluded["save"],
            "data/padding_ratio": self.padding / self.steps,
            **slowest_rank(self.towers.tolist()),
            **self._values_by_source(),
        }
        self.restart()
        return values

    def _values_by_source(self) -> dict[str, Any]:
        sums = zip(self.text, self.text_weights, strict=True)
        losses = [float(text / weight) if weight else None for text, weight in sums]
        return {
            **{f"loss/text/{name}": loss for name, loss in zip(self.sources, losses, strict=True)},
            **{f"data/samples/{name}": int(n) for name, n in zip(self.sources, self.samples_by_source, strict=True)},
        }


def slowest_rank(tower_seconds: list[float]) -> dict[str, Any]:
    """Compare the ranks by the time of their frozen towers, which do the same work on every rank.

    Returns the slowest rank and the ratio of its time to the median rank's. Both are None if the towers did not run.
    """
    typical = median_low(tower_seconds)
    if not typical:
        return {"ranks/slowest": None, "ranks/slowest_ratio": None}
    slowest = max(tower_seconds)
    return {"ranks/slowest": tower_seconds.index(slowest), "ranks/slowest_ratio": slowest / typical}
