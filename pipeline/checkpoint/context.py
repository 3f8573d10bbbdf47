"""The context that saving and resuming share: engine, ranks, run folder and host copies of the state."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.folder import CHECKPOINTS
from pipeline.checkpoint.manifest import Identity
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.distributed.ranks import Ranks
from pipeline.engine import Engine
from pipeline.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class CheckpointContext:
    """The engine whose state is saved and restored, and the recipe, ranks and identity of its run."""

    recipe: Recipe
    ranks: Ranks
    identity: Identity
    engine: Engine
    probe: Probe | None = None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.dir) / CHECKPOINTS

    @functools.cached_property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.engine)

    @property
    def total_bytes(self) -> int:
        """Size of one checkpoint in bytes, summed over all ranks."""
        return self.snapshot.bytes * self.ranks.world_size

    @property
    def sharding(self) -> dict[str, int]:
        """Manifest entries that describe how the state is split into files.

        A run with different values reshards the state.
        """
        return {"world_size": self.ranks.world_size, "zero_stage": self.engine.zero_optimization_stage()}
