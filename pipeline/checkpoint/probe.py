"""The probe: losses of one fixed global batch, which verify that a loaded state computes what the saved state did.

The batch is the first one of the training plan. Its losses are stored in the checkpoint. After loading, they are
computed again and must be the same.
"""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.vision import Towers
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.engine import Engine
from pipeline.recipe import Recipe
from pipeline.step import forward

# Relative tolerance. A different batch split or machine changes the order of sums, and so the rounding. Rounding is
# coarser in bf16 than in fp32.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "autocast": 1e-2}


class Probe:
    """Computes the probe losses. All ranks must call the methods at the same steps."""

    def __init__(self, engine: Engine, towers: Towers, recipe: Recipe, ranks: Ranks, data: TrainData):
        self.engine, self.towers, self.recipe, self.ranks = engine, towers, recipe, ranks
        self.rows = data.dataset

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Return the losses summed over the batch and all ranks, and the environment that computed them."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.eval()
        for micro in range(self.rows.per_step):
            batch = self.rows.load(micro).to(self.engine.device)
            losses = forward(self.engine, self.towers, self.recipe.config, batch)
            for i, loss in enumerate((losses.text_nll, losses.align_error)):
                if loss is not None:
                    sums[i] += (loss.double() * batch.real).sum()
        self.engine.train()
        dist.all_reduce(sums)
        text, align = sums.tolist()
        return {"text": text, "align": align, "where": self._environment()}

    def compare(self, saved: dict[str, Any]) -> str | None:
        """Measure again and compare with `saved`. Describe the difference, or return None if the losses agree."""
        now = self.measure()
        exact = self.ranks.device.type == "cpu" and saved["where"] == now["where"]
        tolerance = 0.0 if exact else TOLERANCE[self.recipe.engine.precision]
        for loss in ("text", "align"):
            if not losses_agree(now[loss], saved[loss], tolerance):
                return (
                    f"the {loss} loss of the probe is {now[loss]!r}, but was {saved[loss]!r} when the checkpoint was "
                    f"saved (relative tolerance {tolerance:.0e})"
                )
        return None

    def _environment(self) -> dict[str, Any]:
        """Return the settings and versions that determine the last bits of the losses.

        On a CPU, the losses are equal to the last bit if these entries are equal.
        """
        return {
            "world_size": self.ranks.world_size,
            "micro_batch": self.recipe.optim.micro_batch,
            "device": self.ranks.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.node(),
            "processor": _processor(),
        }


def losses_agree(now: float, saved: float, tolerance: float) -> bool:
    """Compare two losses. Two NaNs agree, because then the training had already diverged when the state was saved."""
    return math.isclose(now, saved, rel_tol=tolerance) or (math.isnan(now) and math.isnan(saved))


def _processor() -> str:
    """Return the processor's model and the instruction set that torch uses."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return f"{model[1] if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
