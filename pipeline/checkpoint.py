"""Save, verify, resume, prune. A checkpoint is a folder whose manifest names every file with its size and hash.

`checkpoints/step-00000500/` appears by one rename, after every rank has synced and hashed what it wrote; `latest` is
replaced after that. Whatever stands there was complete once, and verifying tells whether it still is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UserError
from pipeline.agreement import on_main
from pipeline.files import sync_file, write_json
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from preprocess.shards import file_sha256, publish, sync_folder

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
REFUSED = ".refused-"


@dataclass(frozen=True)
class Identity:
    """What must be equal for a checkpoint to continue a run."""

    recipe: dict[str, Any]
    fingerprint: str
    shards_sha256: str
    total_steps: int
    zero_stage: int


class Checkpoints:
    """The checkpoints of one run folder. Every rank constructs it and calls `save` and `resume`."""

    def __init__(self, recipe: Recipe, ranks: Ranks, identity: Identity):
        self.options, self.ranks, self.identity = recipe.checkpoint, ranks, identity
        self.folder = Path(recipe.run.dir) / "checkpoints"

    def due(self, step: int) -> bool:
        return step % self.options.every_steps == 0

    def save(self, engine: Any, step: int) -> None:
        """Publish the state after `step` optimizer steps. Every rank must call it."""
        name = folder_name(step)
        partial = self.folder / f"{PARTIAL}{name}"
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(partial), tag="state", save_latest=False, exclude_frozen_parameters=True)
        files = self._sync_and_hash(partial)
        if self.ranks.is_main:
            self._publish(partial, name, step, files)
        dist.barrier()

    def _sync_and_hash(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Each rank takes its share of the main rank's list of files; all get the whole table."""
        dist.barrier()
        paths = on_main(self.ranks, lambda: sorted(path for path in partial.rglob("*") if path.is_file()))
        mine = {}
        for path in paths[self.ranks.rank :: self.ranks.world_size]:
            sync_file(path)
            mine[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        tables: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(tables, mine)
        return {name: facts for table in tables for name, facts in table.items()}

    def _must_match(self) -> dict[str, Any]:
        """Beside the recipe's identity. The number of ranks and the ZeRO stage shape the files of a checkpoint."""
        return {
            "shards_sha256": self.identity.shards_sha256,
            "total_steps": self.identity.total_steps,
            "world_size": self.ranks.world_size,
            "zero_stage": self.identity.zero_stage,
        }

    def _publish(self, partial: Path, name: str, step: int, files: dict[str, dict[str, Any]]) -> None:
        manifest = {
            "step": step,
            **self._must_match(),
            "recipe": self.identity.recipe,
            "fingerprint": self.identity.fingerprint,
            "torch": torch.__version__,
            "files": dict(sorted(files.items())),
        }
        write_json(partial / MANIFEST, manifest)
        for folder in {partial, *((partial / file).parent for file in files)}:
            sync_folder(folder)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # one whose deletion was cut off
        partial.rename(self.folder / name)
        sync_folder(self.folder)
        publish(self.folder / "latest", f"{name}\n".encode())
        for refused in self.folder.glob(f"{REFUSED}*"):  # kept as evidence until there is a good one again
            shutil.rmtree(refused)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Only complete checkpoints count as kept. The manifest goes first: half a deletion is no checkpoint."""
        steps = [step for step in list_steps(self.folder) if step <= newest]
        keep = set(steps[-self.options.keep_last :])
        if self.options.keep_every:
            keep |= {step for step in steps if step % self.options.keep_every == 0}
        for step in set(steps) - keep:
            folder = self.folder / folder_name(step)
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)

    def resume(self, engine: Any) -> tuple[int, list[str]]:
        """Load the newest checkpoint that verifies: (steps done, lines to report). Every rank must call it, once.

        Raises: UserError on all ranks if there are checkpoints but none is good, or if the newest good one belongs to
        another training.
        """
        step, report = on_main(self.ranks, self._choose)
        if step is None:
            return 0, report
        folder = self.folder / folder_name(step)
        engine.load_checkpoint(str(folder), tag="state")
        return step, report

    def _choose(self) -> tuple[int | None, list[str]]:
        report: list[str] = []
        for leftover in self.folder.glob(f"{PARTIAL}*") if self.folder.exists() else ():
            shutil.rmtree(leftover)
            report.append(f"removed {leftover.name}: its save was cut off")
        for step in reversed(list_steps(self.folder)):
            folder = self.folder / folder_name(step)
            damage = find_damage(folder)
            if damage is None:
                self._check_identity(folder)
                report.append(f"resuming from {folder}")
                return step, report
            self._refuse(folder)
            report.append(f"refused {folder}: {damage}")
        if self.folder.exists() and any(self.folder.iterdir()):
            what = "; ".join([*report, f"{self.folder} holds no good checkpoint, and is not empty"])
            raise UserError(f"{what}; to start afresh, move it away")
        return None, report

    def _refuse(self, folder: Path) -> None:
        """Take a damaged checkpoint out of the way of its successor, and out of what retention counts."""
        away = folder.with_name(f"{REFUSED}{folder.name}")
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)

    def _check_identity(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if manifest.get("fingerprint") != self.identity.fingerprint:
            changed = _differences(manifest.get("recipe", {}), self.identity.recipe)
            raise UserError(
                f"{folder} belongs to another training; changed since: {'; '.join(changed)}; "
                f"give the old values, or another run.dir to start afresh"
            )
        for key, found in self._must_match().items():
            if manifest.get(key) != found:
                raise UserError(
                    f"{folder}: {key} is {manifest.get(key)}, this run has {found}; resume with the same, "
                    f"or give another run.dir to start afresh"
                )


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, ascending; published means that the manifest is there."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"step-*/{MANIFEST}"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: UserError if it is not there or not readable."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["files"], dict):
            raise TypeError("its files are no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST}: {error!r}") from None
    return manifest


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if every one has the size and hash that were written down."""
    try:
        files = read_manifest(folder)["files"]
    except UserError as error:
        return str(error)
    for name, facts in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
        if file_sha256(path) != facts["sha256"]:
            return f"{name} has changed: its sha256 is not the one that was written down"
    return None


def full_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole, in fp32, on the CPU, from a checkpoint's shards."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="state")


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{path}.")
        elif before != after:
            lines.append(f"{path} was {before}, now {after}")
    return lines
