"""The objects that saving and resuming share."""

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
    """The engine whose state is saved, its host copies, and the run that it belongs to."""

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
        """Size of one checkpoint over all ranks."""
        return self.snapshot.bytes * self.ranks.world_size

    @property
    def sharding(self) -> dict[str, int]:
        """The manifest entries that decide how the files are split; a checkpoint may be loaded with others."""
        return {"world_size": self.ranks.world_size, "zero_stage": self.engine.zero_optimization_stage()}
