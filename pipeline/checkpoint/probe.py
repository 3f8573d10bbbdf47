"""Whether a loaded state computes what the saved one computed: the losses of one fixed global batch, without training.

The batch is the plan's first. Its losses go into the checkpoint; after loading they must come out again.
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

# Relative. Another split of the batch, or another machine, sums in another order; bf16 rounds what it sums.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "autocast": 1e-2}


class Probe:
    """Every rank must call `measure` and `compare`, at the same steps."""

    def __init__(self, engine: Engine, towers: Towers, recipe: Recipe, ranks: Ranks, data: TrainData):
        self.engine, self.towers, self.recipe, self.ranks = engine, towers, recipe, ranks
        self.rows = data.dataset

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Losses summed over the batch's rows and all ranks, and where they were computed."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.eval()
        for micro in range(self.rows.per_step):
            batch = self.rows.load(micro).to(self.engine.device)
            losses = forward(self.engine, self.towers, self.recipe.config, batch)
            for i, each in enumerate((losses.text_nll, losses.align_error)):
                if each is not None:
                    sums[i] += (each.double() * batch.real).sum()
        self.engine.train()
        dist.all_reduce(sums)
        text, align = sums.tolist()
        return {"text": text, "align": align, "where": self._where()}

    def compare(self, saved: dict[str, Any]) -> str | None:
        """What is wrong with the state now, if it is not the one that gave `saved`."""
        now = self.measure()
        exact = self.ranks.device.type == "cpu" and saved["where"] == now["where"]
        tolerance = 0.0 if exact else TOLERANCE[self.recipe.engine.precision]
        for loss in ("text", "align"):
            if not _same(now[loss], saved[loss], tolerance):
                return (
                    f"the {loss} loss of the probe is {now[loss]!r}, it was {saved[loss]!r} when it was saved "
                    f"(allowed: {tolerance:.0e} of it)"
                )
        return None

    def _where(self) -> dict[str, Any]:
        """Where all of this is equal, on a CPU, so is every bit of the losses. Containers may share a name."""
        return {
            "world_size": self.ranks.world_size,
            "micro_batch": self.recipe.optim.micro_batch,
            "device": self.ranks.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.node(),
            "processor": _processor(),
        }


def _same(now: float, saved: float, tolerance: float) -> bool:
    """A state that had diverged when it was saved is that state still."""
    return math.isclose(now, saved, rel_tol=tolerance) or (math.isnan(now) and math.isnan(saved))


def _processor() -> str:
    """Its model, and which of its instructions torch uses."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    return f"{model[1] if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
