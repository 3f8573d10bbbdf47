"""Saving of checkpoints in the background: writing, publishing, and deleting old ones.

`checkpoints/step-00000500/` appears by one rename, after every rank has written, synced and hashed its files. `latest`
is replaced after that. Therefore every published checkpoint is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UserError, oserror_remedy
from model.hashing import file_sha256
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import LATEST, PARTIAL, REFUSED, folder_name, list_steps
from pipeline.checkpoint.layout import LAYOUT, Layout
from pipeline.checkpoint.manifest import write_manifest
from pipeline.checkpoint.retention import delete, prune, steps_to_keep
from pipeline.distributed.collectives import broadcast_from_main
from pipeline.errors import RetryableError, retryable_oserrors
from pipeline.zero import parameter_shapes, tied_names
from preprocess.atomic import publish, sync_folder


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A save in progress. `share` resolves to the files that this rank wrote and the pieces in them."""

    step: int
    updates: float
    probe: dict[str, Any]
    share: Future[dict[str, Any]]
    started: float
    stall_s: float


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint. `stall_s`: time that training waited; `whole_s`: time from `save` to publication."""

    step: int
    stall_s: float
    whole_s: float


class Saver:
    """Saves the checkpoints of one run. Every rank constructs it and calls its methods, at the same steps.

    `save` returns once the state is copied to host memory. `commit` publishes the checkpoint; call it once no rank is
    `writing` any more. At most one save is in progress.
    """

    def __init__(self, context: CheckpointContext, *, resumed_from: int = 0):
        self.context, self.config, self.ranks = context, context.recipe.checkpoint, context.ranks
        self.folder = context.folder
        self.writer = ThreadPoolExecutor(1)
        self.pending: PendingSave | None = None
        self.good = {resumed_from} if resumed_from else set[int]()  # steps that this launch has verified or written

    def due(self, step: int) -> bool:
        return step % self.config.every_steps == 0

    def save(self, step: int) -> Saved | None:
        """Start saving the state after `step` optimizer steps. Return the checkpoint that this call published, if any.

        Raises on all ranks: the errors of `commit` for the previous save; UserError if the disk lacks space for this
        checkpoint.
        """
        published = self.finish()
        started = time.monotonic()
        broadcast_from_main(self.ranks, lambda: self._check_space(step))
        updates = self.context.snapshot.take()
        probe = self.context.probe.measure() if self.context.probe else {}
        share = self.writer.submit(self._write, self._partial(step))
        self.pending = PendingSave(
            step=step, updates=updates, probe=probe, share=share, started=started, stall_s=time.monotonic() - started
        )
        return published if self.config.background else self.finish()

    @property
    def in_progress(self) -> bool:
        return self.pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank has not yet written all its files of the save in progress."""
        return self.pending is not None and not self.pending.share.done()

    def finish(self) -> Saved | None:
        """Wait for the save in progress, if there is one, and publish it."""
        return self.commit() if self.pending else None

    def commit(self) -> Saved:
        """Wait until all ranks have written their files, then publish the checkpoint.

        Raises on all ranks, if any rank could not write: UserError if the user must act, otherwise RetryableError.
        Earlier checkpoints are unchanged.
        """
        assert self.pending is not None
        pending, self.pending = self.pending, None
        called = time.monotonic()
        try:
            shares = self._gather(pending)
            broadcast_from_main(self.ranks, lambda: self._publish(pending, shares))
        except (UserError, RetryableError):
            if self.ranks.is_main:
                shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            raise
        now = time.monotonic()
        return Saved(step=pending.step, stall_s=pending.stall_s + now - called, whole_s=now - pending.started)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{PARTIAL}{folder_name(step)}"

    def _check_space(self, step: int) -> None:
        """Check the disk space for the files of all ranks before any rank writes."""
        needed = self.context.total_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes free, {needed} needed")
        except OSError as error:
            raise _save_error(self.folder, step, error) from None

    def _write(self, partial: Path) -> dict[str, Any]:
        """Write this rank's files. Runs in the background thread."""
        partial.mkdir(parents=True, exist_ok=True)
        snapshot, rank = self.context.snapshot, self.ranks.rank
        return {"files": snapshot.write(partial, rank), "pieces": snapshot.pieces(rank)}

    def _gather(self, pending: PendingSave) -> list[dict[str, Any]]:
        """Return the share of every rank. Raises on all ranks: the error of the first rank that could not write."""
        error = pending.share.exception()  # waits until the background thread is done
        share = _save_error(self.folder, pending.step, error) if error else pending.share.result()
        shares: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(shares, share)
        for failure in (share for share in shares if isinstance(share, Exception)):
            raise failure
        return shares

    def _publish(self, pending: PendingSave, shares: list[dict[str, Any]]) -> None:
        """Complete the folder that all ranks wrote, rename it, and delete old checkpoints. Runs on the main rank."""
        partial, name = self._partial(pending.step), folder_name(pending.step)
        try:
            self._write_layout_and_manifest(partial, pending, shares)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # an unpublished folder of that name
            partial.rename(self.folder / name)
            sync_folder(self.folder)
            with contextlib.suppress(IsADirectoryError):  # somebody has created it; resuming does not need it
                publish(self.folder / LATEST, f"{name}\n".encode())
        except OSError as error:
            raise _save_error(self.folder, pending.step, error) from None
        self.good.add(pending.step)
        for line in self._clean_up():
            print(line, flush=True)

    def _write_layout_and_manifest(self, partial: Path, pending: PendingSave, shares: list[dict[str, Any]]) -> None:
        engine, identity = self.context.engine, self.context.identity
        pieces = {file: held for share in shares for file, held in share["pieces"].items()}
        Layout(parameter_shapes(engine), tied_names(engine), pieces).save(partial)
        files = {file: facts for share in shares for file, facts in share["files"].items()}
        files[LAYOUT] = {"bytes": (partial / LAYOUT).stat().st_size, "sha256": file_sha256(partial / LAYOUT)}
        manifest = {
            "step": pending.step,
            **identity.must_match(),
            **self.context.sharding,
            "updates": pending.updates,
            "probe": pending.probe,
            "recipe": identity.recipe,
            "fingerprint": identity.fingerprint,
            "torch": torch.__version__,
            "files": dict(sorted(files.items())),
        }
        write_manifest(partial, manifest)

    def _clean_up(self) -> Iterator[str]:
        """Delete the checkpoints that retention does not keep, and the refused ones. Yield a line for each failure.

        Refused checkpoints can help to find the cause of the damage, so they are kept until the next save.
        """
        with retryable_oserrors(self.folder):
            steps = list_steps(self.folder)
            has_space = shutil.disk_usage(self.folder).free >= self.context.total_bytes
        keep = steps_to_keep(
            steps,
            self.good,
            keep_last=self.config.keep_last,
            keep_every=self.config.keep_every,
            has_space=has_space,
        )
        yield from prune(self.folder / folder_name(step) for step in steps if step not in keep)
        yield from delete(self.folder.glob(f"{REFUSED}*"))


def _save_error(folder: Path, step: int, error: BaseException) -> UserError | RetryableError:
    message = f"{folder}: the checkpoint of step {step} could not be written ({error}); earlier ones are unchanged"
    if remedy := oserror_remedy(error):
        return UserError(f"{message}; {remedy}, and run the same command again")
    return RetryableError(message)
