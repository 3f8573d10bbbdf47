"""Which checkpoints stay, and how the others go. A deletion that fails ends no training."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pipeline.checkpoint.folder import PRUNED


def kept(steps: Collection[int], good: Collection[int], keep_last: int, keep_every: int, room: bool) -> set[int]:
    """Of the checkpoints of these steps. `good`: those that this start wrote, or verified.

    The others may have been damaged since they were written: as long as there are not enough good ones, as many of them
    are kept besides, if there is `room` for the next save.
    """
    newest, others = sorted(good)[-keep_last:], sorted(set(steps) - set(good))
    forever = {step for step in steps if keep_every and step % keep_every == 0}
    missing = keep_last - len(newest)
    return forever.union(newest, others[-(keep_last if room else missing) :] if missing else ())


def prune(folders: Iterable[Path]) -> Iterator[str]:
    """Delete checkpoints; a line for each that will not go. One that is cut off leaves what the next start removes."""
    for folder in folders:
        pruned = folder.with_name(f"{PRUNED}{folder.name}")
        try:
            folder.rename(pruned)
        except OSError as error:
            yield _stays(folder, error)
        else:
            yield from delete([pruned])


def delete(folders: Iterable[Path]) -> Iterator[str]:
    """A line for each that will not go: somebody may read it, or may have taken the right away."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # noqa: PERF203
            yield _stays(folder, error)


def _stays(folder: Path, error: OSError) -> str:
    return f"{folder} could not be deleted ({error}) and takes room; the next start tries again, or delete it by hand"
