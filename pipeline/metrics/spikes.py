"""Spike detection: finds steps whose loss or gradient norm stands out from the steps before."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.step import StepReport

MEDIAN_STEPS = 16  # number of last steps of one modality whose median is the usual value
NOISE_STEPS = 128  # number of last deviations from the usual value that determine the noise
MIN_NOISE_STEPS = 48  # number of deviations that must be known before a step can be a spike
Z_THRESHOLD = 7.0
# Lower bound of the noise, as a standard deviation of the logarithm. A spike is therefore at least a third more loss
# (e ** (7 * 0.041) = 1.33) or two and a half times the gradient norm, however little the previous steps varied.
MIN_NOISE = {"loss/total": 0.041, "optim/grad_norm": 0.131}
# The noise is estimated from this quantile. In a normal distribution it is 1.645 standard deviations above the mean.
QUANTILE, QUANTILE_TO_STD = 0.95, 1 / 1.645


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A value that stands out.

    Attributes:
        usual: median of the last steps.
        z: distance of the value's logarithm from that of `usual`, in standard deviations of the noise.
    """

    key: str
    value: float
    usual: float
    z: float

    def facts(self) -> dict[str, Any]:
        """Return the values that a `spike` event logs."""
        return {"key": self.key, "value": self.value, "usual": round(self.usual, 4), "z": round(self.z, 1)}


class SpikeDetector:
    """Compare the loss and the gradient norm of each step with the last steps of the same modality.

    Values are compared as logarithms, because both are positive and vary by factors. The noise is estimated from an
    upper quantile of the deviations, so that batches of a rare kind with a higher loss count as noise. A single spike
    hardly changes the quantile, so that the next one is found too.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, bool], deque[float]] = defaultdict(lambda: deque(maxlen=MEDIAN_STEPS))
        self.deviations: dict[tuple[str, bool], deque[float]] = defaultdict(lambda: deque(maxlen=NOISE_STEPS))

    def check(self, report: StepReport, *, has_images: bool) -> list[Spike]:
        """Return the spikes of this step, then add the step to the history. Steps that are not finite are ignored."""
        if not report.finite:
            return []
        spikes = []
        for key, value in (("loss/total", report.total), ("optim/grad_norm", report.grad_norm)):
            values, deviations = self.values[key, has_images], self.deviations[key, has_images]
            logarithm = math.log(max(value, 1e-30))
            if len(values) == MEDIAN_STEPS:
                usual = median(values)
                z = (logarithm - usual) / max(_noise(deviations), MIN_NOISE[key])
                if z > Z_THRESHOLD and len(deviations) >= MIN_NOISE_STEPS:
                    spikes.append(Spike(key=key, value=value, usual=math.exp(usual), z=z))
                deviations.append(logarithm - usual)
            values.append(logarithm)
        return spikes


def _noise(deviations: Iterable[float]) -> float:
    """Estimate the standard deviation from the upper quantile, assuming a normal distribution."""
    ordered = sorted(deviations)
    return ordered[int(QUANTILE * len(ordered))] * QUANTILE_TO_STD if ordered else 0.0
