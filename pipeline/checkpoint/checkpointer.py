"""Save, verify, resume, prune. A checkpoint is a folder whose manifest names every file with its size and hash.

`checkpoints/step-00000500/` appears by one rename, after every rank has written, synced and hashed its share; `latest`
is replaced after that. Whatever stands there was complete once, and verifying tells whether it still is.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UserError, oserror_remedy
from model.hashing import file_sha256
from pipeline.checkpoint.folder import (
    DOUBTED,
    MANIFEST,
    PARTIAL,
    REFUSED,
    find_leftovers,
    find_steps,
    first_damage,
    folder_name,
    is_whole,
    list_steps,
    quarantine,
    read_manifest,
    seal,
)
from pipeline.checkpoint.layout import LAYOUT, Layout
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.retention import delete, kept, prune
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.distributed.collectives import broadcast_from_main
from pipeline.distributed.ranks import Ranks
from pipeline.engine import Engine
from pipeline.errors import RetryableError, retryable_oserrors
from pipeline.recipe import Recipe
from pipeline.zero import parameter_shapes, tied_names
from preprocess.atomic import publish, sync_folder, write_json


@dataclass(frozen=True)
class Identity:
    """What must be equal for a checkpoint to continue a run."""

    recipe: dict[str, Any]
    fingerprint: str
    shards_sha256: str
    total_steps: int


@dataclass
class Saving:
    """A save that was begun. `share` becomes what this rank wrote: files, and the map of them."""

    step: int
    updates: float
    probe: dict[str, Any]
    share: Future[dict[str, Any]]
    begun: float
    stall_s: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there. `stall_s`: how long the training stood still for it; `whole_s`: from begin to end."""

    step: int
    stall_s: float
    whole_s: float


class Checkpointer:
    """The checkpoints of one run folder. Every rank constructs it and calls its methods, at the same steps.

    A save is begun by `save`, which returns when the state is copied, and ended by `commit`, once no rank is `writing`.
    At most one is under way.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, identity: Identity, engine: Engine, probe: Probe | None = None):
        self.options, self.ranks, self.identity, self.engine = recipe.checkpoint, ranks, identity, engine
        self.probe = probe
        self.folder = Path(recipe.run.dir) / "checkpoints"
        self.snapshot = Snapshot(engine)
        self.writer = ThreadPoolExecutor(1)
        self.saving: Saving | None = None
        self.good = set[int]()  # steps whose checkpoints this start has written or verified

    def due(self, step: int) -> bool:
        return step % self.options.every_steps == 0

    # -- Saving --------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Saved | None:
        """Begin to save the state after `step` optimizer steps; a checkpoint that is there by this call, if one is."""
        before = self.finish()
        begun = time.monotonic()
        broadcast_from_main(self.ranks, lambda: self._check_room(step))
        updates = self.snapshot.take()
        probe = self.probe.measure() if self.probe else {}
        share = self.writer.submit(self._write, self._partial(step))
        self.saving = Saving(step, updates, probe, share, begun, time.monotonic() - begun)
        return before if self.options.background else self.finish()

    @property
    def under_way(self) -> bool:
        return self.saving is not None

    @property
    def writing(self) -> bool:
        """Whether this rank has still to do its part of the save under way."""
        return self.saving is not None and not self.saving.share.done()

    def finish(self) -> Saved | None:
        """Wait for the save under way, if there is one, and commit it."""
        return self.commit() if self.saving else None

    def commit(self) -> Saved:
        """Publish what all ranks wrote; wait for those that are still writing.

        Raises: UserError on all ranks if one could not write and people must see to that, RetryableError if it may be
        tried again. The checkpoints before it are untouched.
        """
        assert self.saving is not None
        saving, self.saving = self.saving, None
        called = time.monotonic()
        try:
            shares = self._gather(saving)
            broadcast_from_main(self.ranks, lambda: self._publish(saving, shares))
        except (UserError, RetryableError):
            if self.ranks.is_main:
                shutil.rmtree(self._partial(saving.step), ignore_errors=True)
            raise
        now = time.monotonic()
        return Saved(saving.step, saving.stall_s + now - called, now - saving.begun)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{PARTIAL}{folder_name(step)}"

    @property
    def _bytes(self) -> int:
        """Of one checkpoint."""
        return self.snapshot.bytes * self.ranks.world_size

    def _check_room(self, step: int) -> None:
        """For the files of all ranks, before any of them takes some of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.folder).free) < self._bytes:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes free, {self._bytes} needed")
        except OSError as error:
            raise _unsaved(self.folder, step, error) from None

    def _write(self, partial: Path) -> dict[str, Any]:
        """In the background: this rank's files."""
        partial.mkdir(parents=True, exist_ok=True)
        files = self.snapshot.write(partial, self.ranks.rank)
        return {"files": files, "pieces": self.snapshot.pieces(self.ranks.rank)}

    def _gather(self, saving: Saving) -> list[dict[str, Any]]:
        """What every rank wrote. Raises: `_unsaved` on all ranks, with what the first of those that failed met."""
        error = saving.share.exception()  # waits
        shares: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(shares, _unsaved(self.folder, saving.step, error) if error else saving.share.result())
        for failed in (share for share in shares if isinstance(share, Exception)):
            raise failed
        return shares

    def _publish(self, saving: Saving, shares: list[dict[str, Any]]) -> None:
        partial, name = self._partial(saving.step), folder_name(saving.step)
        try:
            files = {file: facts for share in shares for file, facts in share["files"].items()}
            pieces = {file: mine for share in shares for file, mine in share["pieces"].items()}
            Layout(parameter_shapes(self.engine), tied_names(self.engine), pieces).save(partial)
            files[LAYOUT] = {"bytes": (partial / LAYOUT).stat().st_size, "sha256": file_sha256(partial / LAYOUT)}
            self._write_manifest(partial, saving, files)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # one without a manifest
            partial.rename(self.folder / name)
            sync_folder(self.folder)
            publish(self.folder / "latest", f"{name}\n".encode())
        except OSError as error:
            raise _unsaved(self.folder, saving.step, error) from None
        self.good.add(saving.step)
        for line in self._clean_up():
            print(line, flush=True)

    def _write_manifest(self, partial: Path, saving: Saving, files: dict[str, dict[str, Any]]) -> None:
        manifest = {
            "step": saving.step,
            **self._must_match(),
            **self._shape(),
            "updates": saving.updates,
            "probe": saving.probe,
            "recipe": self.identity.recipe,
            "fingerprint": self.identity.fingerprint,
            "torch": torch.__version__,
            "files": dict(sorted(files.items())),
        }
        write_json(partial / MANIFEST, manifest | {"seal": seal(manifest)})

    def _must_match(self) -> dict[str, Any]:
        """Beside the recipe's identity."""
        return {"shards_sha256": self.identity.shards_sha256, "total_steps": self.identity.total_steps}

    def _shape(self) -> dict[str, int]:
        """What shapes the files, and may differ when they are loaded."""
        return {"world_size": self.ranks.world_size, "zero_stage": self.engine.zero_optimization_stage()}

    def _clean_up(self) -> Iterator[str]:
        """Delete what retention does not keep, and the refused ones, evidence until there is a good one again."""
        with retryable_oserrors(f"{self.folder}"):
            steps, room = list_steps(self.folder), shutil.disk_usage(self.folder).free >= self._bytes
        keep = kept(steps, self.good, self.options.keep_last, self.options.keep_every, room)
        yield from prune(self.folder / folder_name(step) for step in steps if step not in keep)
        yield from delete(self.folder.glob(f"{REFUSED}*"))

    # -- Resuming ------------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, list[str]]:
        """Load the newest checkpoint that verifies: (steps done, lines to report).

        Raises: UserError on all ranks if there are checkpoints but none is good, or if the newest good one belongs to
        another training; RetryableError on all ranks if the file system fails, or the probe agrees with none of them.
        """
        report, doubted = broadcast_from_main(self.ranks, self._sweep), list[Path]()
        for step in broadcast_from_main(self.ranks, lambda: list_steps(self.folder)[::-1]):
            folder = self.folder / folder_name(step)
            if flaw := self.verify_and_load(folder):
                broadcast_from_main(self.ranks, functools.partial(quarantine, folder, REFUSED))
                report.append(f"refused {folder}: {flaw}")
            elif doubt := self.doubt(folder):
                doubted.append(folder)
                report.append(f"refused {folder}: {doubt}")
            else:
                for away in broadcast_from_main(self.ranks, lambda: [quarantine(each, DOUBTED) for each in doubted]):
                    report.append(
                        f"{away} is sound and stays; to try it elsewhere, rename it back, and move later ones away"
                    )
                self.good.add(step)
                return step, [*report, f"resuming from {folder}", *self._converted(folder)]
        if doubted:
            told = f"their files are sound, so {socket.gethostname()} may compute wrongly, and they were left in place"
            raise RetryableError("; ".join([*report, told]))
        broadcast_from_main(self.ranks, lambda: self._check_empty(report))
        return 0, report

    def verify_and_load(self, folder: Path) -> str | None:
        """Make a checkpoint the engine's state, or tell what is wrong with it; the same on all ranks."""
        return broadcast_from_main(self.ranks, lambda: self._inspect(folder)) or self.load(folder)

    def _sweep(self) -> list[str]:
        """Remove what kills have left, and set aside what has lost its manifest."""
        with retryable_oserrors(f"{self.folder}"):
            leftovers = find_leftovers(self.folder)
            bare = [path for path in find_steps(self.folder) if not is_whole(path)]
        stay = list(delete(leftovers))
        gone = [f"removed {path.name}: its {cut} was cut off" for path, cut in leftovers.items() if not path.exists()]
        for path in bare:
            quarantine(path, REFUSED)
        return [*gone, *stay, *(f"refused {path}: it has no {MANIFEST}" for path in bare)]

    def _inspect(self, folder: Path) -> str | None:
        """What is wrong with the manifest or the map. Raises: UserError if they are another training's."""
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            return str(error)
        if manifest["fingerprint"] != self.identity.fingerprint:
            changed = _differences(manifest["recipe"], self.identity.recipe)
            raise UserError(
                f"{folder} belongs to another training; changed since: {'; '.join(changed)}; "
                f"give the old values, or another run.dir to start afresh"
            )
        for key, found in self._must_match().items():
            if manifest[key] != found:
                raise UserError(
                    f"{folder}: {key} is {manifest[key]}, this run has {found}; resume with the same, "
                    f"or give another run.dir to start afresh"
                )
        return first_damage(folder, {LAYOUT: manifest["files"][LAYOUT]})

    def load(self, folder: Path) -> str | None:
        """Every rank hashes what the rank of its number wrote, and reads its pieces: at once, if these are the same."""
        manifest, layout = self._manifest(folder), broadcast_from_main(self.ranks, lambda: Layout.load(folder))
        files = manifest["files"]
        whole = self.snapshot.whole_files(layout, files)
        mine = {name for name in files if _writer(name) % self.ranks.world_size == self.ranks.rank}
        ours = {name: files[name] for name in sorted(mine | whole.keys())}
        flaw = self._everywhere(lambda: first_damage(folder, ours, into=whole))
        flaw = flaw or self._everywhere(lambda: self.snapshot.read(folder, layout, but_for=whole))
        if not flaw:
            self.snapshot.restore(manifest["updates"])
        return flaw

    def doubt(self, folder: Path) -> str | None:
        """What the probe has against the state that was loaded: it must give what it gave at the save."""
        return self.probe.compare(self._manifest(folder)["probe"]) if self.probe else None

    def _manifest(self, folder: Path) -> dict[str, Any]:
        """Read once for all ranks, which then read the same."""
        return broadcast_from_main(self.ranks, lambda: read_manifest(folder))

    def _everywhere(self, look: Callable[[], str | None]) -> str | None:
        """The flaws that any rank finds. Raises: RetryableError on all ranks if one could not look."""
        mine: str | RetryableError | None
        try:
            mine = look()
        except (UserError, FileNotFoundError) as error:
            mine = str(error)
        except RetryableError as error:
            mine = error
        found: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(found, mine)
        for lost in (each for each in found if isinstance(each, RetryableError)):
            raise lost
        return "; ".join(dict.fromkeys(filter(None, found))) or None

    def _converted(self, folder: Path) -> list[str]:
        manifest, now = self._manifest(folder), self._shape()
        if all(manifest[key] == value for key, value in now.items()):
            return []
        before, after = (
            f"{at['world_size']} rank{'s' * (at['world_size'] > 1)}, ZeRO-{at['zero_stage']}" for at in (manifest, now)
        )
        return [f"it was saved by {before}; its pieces were dealt out anew to {after}"]

    def _check_empty(self, report: list[str]) -> None:
        if self.folder.exists() and any(self.folder.iterdir()):
            what = "; ".join([*report, f"{self.folder} holds no good checkpoint, and is not empty"])
            raise UserError(f"{what}; to start afresh, move it away")


def _writer(name: str) -> int:
    """The rank that wrote a file."""
    return int(name.split(".")[0].removeprefix("rank-")) if name.startswith("rank-") else 0


def full_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole, in fp32, on the CPU, from a checkpoint's shards."""
    return Layout.load(folder).whole(folder, "master")


def _unsaved(folder: Path, step: int, error: BaseException) -> UserError | RetryableError:
    told = f"{folder}: the checkpoint of step {step} could not be written ({error}); those before it are as they were"
    if remedy := oserror_remedy(error):
        return UserError(f"{told}; {remedy}, and run the same command again")
    return RetryableError(told)


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{path}.")
        elif before != after:
            lines.append(f"{path} was {before}, now {after}")
    return lines
