"""Steps whose loss or gradient stands out from those before: their samples are worth a look; nothing else is done."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.step import StepReport

RECENT = 16  # steps of one modality whose median is what is usual
WINDOW = 128  # of them: how far they were from what was usual then, is the noise that a step is compared with
LEAST = 48  # of them before anything stands out
Z = 7.0
# Of the logarithm's spread: what a quiet window may not go below, so that it takes a third more loss (e ** (Z * 0.041))
# or two and a half times the gradient to stand out.
LEAST_SPREAD = {"loss/total": 0.041, "optim/grad_norm": 0.131}
TAIL, TAIL_TO_STD = 0.95, 1 / 1.645  # of a normal distribution


@dataclass(frozen=True)
class Spike:
    """`usual`: the median of the last steps; `z`: how far above it, in standard deviations of the logarithm's noise."""

    key: str
    value: float
    usual: float
    z: float

    def facts(self) -> dict[str, Any]:
        return {"key": self.key, "value": self.value, "usual": round(self.usual, 4), "z": round(self.z, 1)}


class Spikes:
    """Compares each step's loss and gradient norm with the last ones of the same modality.

    Logarithms, since both are positive and vary by factors. The noise is the upper tail's: batches are alike in length,
    so that some kinds of answers, and their losses, are rare but no accident. A quantile, since a spike must not hide
    the next one. A new level is usual after a few steps.
    """

    def __init__(self) -> None:
        self.recent: dict[tuple[str, bool], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.above: dict[tuple[str, bool], deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, report: StepReport, has_images: bool) -> list[Spike]:
        """What stands out in this step, if it is finite; the step then belongs to the window."""
        if not report.finite:
            return []
        found = []
        for key, value in (("loss/total", report.total), ("optim/grad_norm", report.grad_norm)):
            recent, noise = self.recent[key, has_images], self.above[key, has_images]
            logarithm = math.log(max(value, 1e-30))
            if len(recent) == RECENT:
                usual = median(recent)
                z = (logarithm - usual) / max(_spread(noise), LEAST_SPREAD[key])
                if z > Z and len(noise) >= LEAST:
                    found.append(Spike(key, value, math.exp(usual), z))
                noise.append(logarithm - usual)
            recent.append(logarithm)
        return found


def _spread(noise: Iterable[float]) -> float:
    """The standard deviation of a normal distribution with this upper tail."""
    ordered = sorted(noise)
    return ordered[int(TAIL * len(ordered))] * TAIL_TO_STD if ordered else 0.0
