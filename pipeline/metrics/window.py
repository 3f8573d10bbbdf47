"""What happened between two log lines: rates, waits, and losses by source. docs/metrics.md lists the keys."""

from __future__ import annotations

import time
from statistics import median_low
from typing import Any

import numpy as np

from pipeline.data.loader import GlobalBatch
from pipeline.metrics.throughput import UsefulFlops
from pipeline.recipe import Recipe
from pipeline.step import StepReport, text_weights


class Window:
    """Sums over steps; `close` makes a line's values of them and begins anew.

    sources  names, in the order of a report's `text_by_source`
    peak     operations per second of all ranks' devices; None if not known
    """

    def __init__(self, recipe: Recipe, sources: list[str], peak: float | None):
        self.recipe, self.sources, self.peak = recipe, sources, peak
        self.flops = UsefulFlops(recipe.config)
        self.restart()

    def restart(self) -> None:
        self.began, self.steps, self.paused = time.monotonic(), 0, {"save": 0.0, "heldout": 0.0}
        self.samples = self.tokens = 0
        self.padding = self.useful = self.data_wait = self.gc = 0.0
        self.towers = np.zeros(1)  # by rank, once a step has told how many there are
        self.text, self.weights, self.by_source = (np.zeros(len(self.sources)) for _ in range(3))

    def add(self, batch: GlobalBatch, report: StepReport) -> None:
        """One step. Each wait counts as long as that of the rank that all others waited for."""
        self.steps += 1
        self.samples += batch.samples
        self.tokens += batch.tokens
        self.padding += batch.padding_ratio
        self.useful += self.flops.of(batch)
        self.data_wait += max(rank.data_wait for rank in report.seconds)
        self.gc += max(rank.gc for rank in report.seconds)
        self.towers = self.towers + np.array([rank.towers for rank in report.seconds])
        self.by_source += batch.sources.samples
        if report.finite:
            self.text += report.text_by_source
            self.weights += text_weights(self.recipe, batch)

    def pause(self, what: str, seconds: float) -> None:
        """Time that was no step's: saving or evaluating."""
        self.paused[what] += seconds

    def close(self) -> dict[str, Any]:
        whole = time.monotonic() - self.began
        seconds = whole - sum(self.paused.values())
        values = {
            "speed/samples_per_s": self.samples / seconds,
            "speed/tokens_per_s": self.tokens / seconds,
            "speed/mfu": self.useful / (seconds * self.peak) if self.peak else None,
            "time/step_s": seconds / self.steps,
            "time/data_wait_s": self.data_wait / self.steps,
            "time/gc_s": self.gc,
            "time/save_stall_s": self.paused["save"],
            "data/padding_ratio": self.padding / self.steps,
            **slowest_rank(self.towers.tolist()),
            **self._by_source(),
        }
        self.restart()
        return values

    def _by_source(self) -> dict[str, Any]:
        means = [float(text / weight) if weight else None for text, weight in zip(self.text, self.weights, strict=True)]
        losses = {f"loss/text/{name}": mean for name, mean in zip(self.sources, means, strict=True)}
        counts = {f"data/samples/{name}": int(n) for name, n in zip(self.sources, self.by_source, strict=True)}
        return losses | counts


def slowest_rank(towers: list[float]) -> dict[str, Any]:
    """Which rank took longest for the work that is the same on all, and how many times the median rank's time."""
    usual = median_low(towers)
    if not usual:  # text alone, or one rank's first step
        return {"ranks/slowest": None, "ranks/slowest_ratio": None}
    return {"ranks/slowest": towers.index(max(towers)), "ranks/slowest_ratio": max(towers) / usual}
