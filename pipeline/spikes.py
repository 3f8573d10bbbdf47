"""Steps whose loss or gradient stands out from those before: their samples are worth a look; nothing else is done."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from pipeline.step import StepReport

WINDOW = 128  # steps of one modality whose noise a step is compared with
RECENT = 16  # of them, the last ones, that tell what is usual
LEAST = 32  # of them before anything stands out
Z = 8.0
# Of the logarithm's spread: what a quiet window may not go below, so that it takes a third more loss (e ** (Z * 0.035))
# or two and a half times the gradient to stand out.
LEAST_SPREAD = {"loss/total": 0.035, "optim/grad_norm": 0.115}
MAD_TO_STD = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Spike:
    """`usual`: the median of the last steps; `z`: how far above it, in robust standard deviations of the logarithm."""

    key: str
    value: float
    usual: float
    z: float

    def facts(self) -> dict[str, Any]:
        return {"key": self.key, "value": self.value, "usual": round(self.usual, 4), "z": round(self.z, 1)}


class Spikes:
    """Compares each step's loss and gradient norm with the last ones of the same modality.

    Logarithms, since both are positive and vary by factors; medians, since a spike must not hide the next one; the
    noise is taken from one step to the next, since the loss also falls. A new level is usual after a few steps.
    """

    def __init__(self) -> None:
        self.windows: dict[tuple[str, bool], deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, report: StepReport, has_images: bool) -> list[Spike]:
        """What stands out in this step, if it is finite; the step then belongs to the window."""
        if not report.finite:
            return []
        found = []
        for key, value in (("loss/total", report.total), ("optim/grad_norm", report.grad_norm)):
            window = self.windows[key, has_images]
            logarithm = math.log(max(value, 1e-30))
            if len(window) >= LEAST:
                usual, z = _standing(logarithm, window, LEAST_SPREAD[key])
                if z > Z:
                    found.append(Spike(key, value, math.exp(usual), z))
            window.append(logarithm)
        return found


def _standing(value: float, window: deque[float], least_spread: float) -> tuple[float, float]:
    values = list(window)
    usual = median(values[-RECENT:])
    spread = MAD_TO_STD / math.sqrt(2) * median(abs(after - before) for before, after in pairwise(values))
    return usual, (value - usual) / max(spread, least_spread)
