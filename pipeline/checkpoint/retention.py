"""The retention rule, which decides which checkpoints are kept, and the deletion of the others."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pipeline.checkpoint.folder import PRUNED
from pipeline.recipe import CheckpointConfig


def steps_to_keep(
    steps: Collection[int], good: Collection[int], *, keep_last: int, keep_every: int, has_space: bool
) -> set[int]:
    """Choose the checkpoints to keep: the newest `keep_last` good ones, and the multiples of `keep_every` forever.

    Checkpoints that are not in `good` may have been damaged since they were written. While fewer than `keep_last` are
    good, the newest `keep_last` of the others are kept too. If disk space is short, only enough others are kept to
    make up `keep_last` in total.

    Args:
        steps: steps of all checkpoints.
        good: steps of the checkpoints that this launch of the run wrote or verified.
        has_space: whether the disk has space for another checkpoint.
    """
    newest, others = sorted(good)[-keep_last:], sorted(set(steps) - set(good))
    forever = {step for step in steps if keep_every and step % keep_every == 0}
    missing = keep_last - len(newest)
    return forever.union(newest, others[-(keep_last if has_space else missing) :] if missing else ())


def count_kept_forever(config: CheckpointConfig, total_steps: int) -> int:
    """Count the checkpoints that `keep_every` keeps at the end of a run, in addition to the newest `keep_last`."""
    saved = {*range(config.every_steps, total_steps, config.every_steps), total_steps}
    keep = steps_to_keep(saved, good=saved, keep_last=config.keep_last, keep_every=config.keep_every, has_space=True)
    return len(keep) - min(config.keep_last, len(saved))


def prune(folders: Iterable[Path]) -> Iterator[str]:
    """Delete checkpoints. Yield a line for each checkpoint that cannot be deleted.

    Each folder is renamed first, so that the next launch recognises an interrupted deletion and finishes it.
    """
    for folder in folders:
        pruned = folder.with_name(f"{PRUNED}{folder.name}")
        try:
            folder.rename(pruned)
        except OSError as error:
            yield _cannot_delete(folder, error)
        else:
            yield from delete([pruned])


def delete(folders: Iterable[Path]) -> Iterator[str]:
    """Delete folders. Yield a line for each folder that cannot be deleted, for example because a process reads it."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # noqa: PERF203
            yield _cannot_delete(folder, error)


def _cannot_delete(folder: Path, error: OSError) -> str:
    return f"{folder} could not be deleted ({error}) and takes space; the next launch tries again, or delete it by hand"
