"""Resuming: verify the newest checkpoint, load it on any number of ranks, and check its probe losses."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.errors import UserError
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import (
    DOUBTED,
    MANIFEST,
    REFUSED,
    DamagedCheckpointError,
    find_leftovers,
    find_steps,
    folder_name,
    is_published,
    quarantine,
)
from pipeline.checkpoint.layout import LAYOUT, Layout
from pipeline.checkpoint.manifest import check_identity, read_manifest
from pipeline.checkpoint.retention import delete
from pipeline.checkpoint.verify import first_damage
from pipeline.distributed.collectives import broadcast_from_main
from pipeline.errors import RetryableError, retryable_oserrors


class Resumer:
    """Loads the newest good checkpoint of a run. Every rank constructs it and calls its methods."""

    def __init__(self, context: CheckpointContext):
        self.context, self.ranks, self.folder = context, context.ranks, context.folder

    def resume(self, steps: Sequence[int]) -> tuple[int, list[str]]:
        """Load the newest good checkpoint: its files are undamaged, and it reproduces its probe losses.

        Return its step and lines for the log. The step is 0 if there are no checkpoints.

        Args:
            steps: steps of the published checkpoints, as `list_steps` returns them. Must be the same on all ranks.

        Raises on all ranks: UserError if all checkpoints are damaged, or if the newest one was saved with other
        settings; RetryableError if the file system fails, or if no undamaged checkpoint reproduces its probe losses.
        """
        report = broadcast_from_main(self.ranks, self._remove_leftovers)
        doubted = list[Path]()
        for step in reversed(steps):
            folder = self.folder / folder_name(step)
            try:
                manifest = self.verify_and_load(folder)
            except DamagedCheckpointError as damage:
                broadcast_from_main(self.ranks, functools.partial(quarantine, folder, REFUSED))
                report.append(f"refused {folder}: {damage}")
                continue
            if difference := self.check_probe(manifest):
                doubted.append(folder)
                report.append(f"refused {folder}: {difference}")
                continue
            report += broadcast_from_main(self.ranks, lambda: [self._set_aside(folder) for folder in doubted])
            return step, [*report, f"resuming from {folder}", *self._resharding(manifest)]
        if doubted:
            host = socket.gethostname()
            suspicion = f"their files are undamaged, so {host} may compute wrongly; they were left in place"
            raise RetryableError("; ".join([*report, suspicion]))
        broadcast_from_main(self.ranks, lambda: self._check_empty(report))
        return 0, report

    def verify_and_load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into the engine and return its manifest. At least one rank hashes each file.

        A file with the same shard layout as a buffer of this rank is read only once, both to hash and to load it.

        Raises on all ranks: DamagedCheckpointError; UserError if the checkpoint was saved with other settings;
        RetryableError if the file system fails.
        """
        manifest, layout = broadcast_from_main(self.ranks, lambda: self._inspect(folder))
        files, snapshot = manifest["files"], self.context.snapshot
        whole = snapshot.whole_files(layout, files)
        mine = {name for name in files if _writing_rank(name) % self.ranks.world_size == self.ranks.rank}
        to_hash = {name: files[name] for name in sorted(mine | whole.keys())}
        self._on_every_rank(lambda: first_damage(folder, to_hash, into=whole))
        self._on_every_rank(lambda: snapshot.read(folder, layout, already_read=whole))
        snapshot.restore(manifest["updates"])
        return manifest

    def check_probe(self, manifest: dict[str, Any]) -> str | None:
        """Compare the probe losses of the loaded state with the saved ones. Describe the difference, or return None."""
        return self.context.probe.compare(manifest["probe"]) if self.context.probe else None

    def _remove_leftovers(self) -> list[str]:
        """Delete the folders of interrupted saves and deletions, and quarantine checkpoints without a manifest."""
        with retryable_oserrors(self.folder):
            leftovers = find_leftovers(self.folder)
            unpublished = [path for path in find_steps(self.folder) if not is_published(path)]
        failures = list(delete(leftovers))
        removed = [
            f"removed {path.name}: its {action} was cut off" for path, action in leftovers.items() if not path.exists()
        ]
        for path in unpublished:
            quarantine(path, REFUSED)
        return [*removed, *failures, *(f"refused {path}: it has no {MANIFEST}" for path in unpublished)]

    def _inspect(self, folder: Path) -> tuple[dict[str, Any], Layout]:
        """Read the manifest and the layout once, on the main rank, so that all ranks use the same content."""
        manifest = read_manifest(folder)
        check_identity(folder, manifest, self.context.identity)
        if damage := first_damage(folder, {LAYOUT: manifest["files"][LAYOUT]}):
            raise DamagedCheckpointError(damage)
        return manifest, Layout.load(folder)

    def _on_every_rank(self, check: Callable[[], str | None]) -> None:
        """Run `check` on every rank. If any rank returns or raises damage, raise it on all ranks.

        Raises: DamagedCheckpointError; UserError or RetryableError if a rank could not read its files.
        """
        finding: str | UserError | RetryableError | None
        try:
            finding = check()
        except (DamagedCheckpointError, FileNotFoundError) as error:
            finding = str(error)
        except (UserError, RetryableError) as error:
            finding = error
        findings: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(findings, finding)
        for failure in (each for each in findings if isinstance(each, (UserError, RetryableError))):
            raise failure
        if distinct := dict.fromkeys(filter(None, findings)):
            raise DamagedCheckpointError("; ".join(distinct))

    def _set_aside(self, folder: Path) -> str:
        renamed = quarantine(folder, DOUBTED)
        return (
            f"{renamed} is undamaged and was kept; "
            "to try it on another machine, rename it back and move the later checkpoints away"
        )

    def _resharding(self, manifest: dict[str, Any]) -> list[str]:
        now = self.context.sharding
        ranks, stages = ((manifest[key], now[key]) for key in ("world_size", "zero_stage"))
        changes = [f"from {ranks[0]} to {ranks[1]} ranks"] if ranks[0] != ranks[1] else []
        changes += [f"from ZeRO-{stages[0]} to ZeRO-{stages[1]}"] if stages[0] != stages[1] else []
        return [f"resharded {', '.join(changes)}"] if changes else []

    def _check_empty(self, report: list[str]) -> None:
        """Raise UserError if the checkpoint folder is not empty, so that no run starts from step 0 by accident."""
        if self.folder.exists() and any(self.folder.iterdir()):
            lines = [*report, f"{self.folder} holds no good checkpoint, but is not empty"]
            raise UserError(f"{'; '.join(lines)}; to start from step 0, move this folder away")


def _writing_rank(name: str) -> int:
    """Return the rank that wrote a file. The main rank writes the layout."""
    return int(name.split(".")[0].removeprefix("rank-")) if name.startswith("rank-") else 0
