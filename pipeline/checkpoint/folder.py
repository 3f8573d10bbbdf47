"""Names and listing of the folders in `run.dir/checkpoints`.

`step-00000500` is a published checkpoint. A prefix marks a folder that is being written or deleted, or that was set
aside because it failed verification.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from model.errors import UserError
from pipeline.errors import retryable_oserrors

CHECKPOINTS = "checkpoints"
LATEST = "latest"  # holds the name of the newest checkpoint, for people; resuming does not read it
MANIFEST = "manifest.json"
PARTIAL = ".partial-"
PRUNED = ".pruned-"
REFUSED = ".refused-"  # damaged
DOUBTED = ".doubted-"  # undamaged, but its probe losses were not reproduced after loading


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is missing, or differs from what was saved."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """List the steps of the published checkpoints, ascending. Published means that the manifest exists.

    Raises: RetryableError if the file system fails.
    """
    with contextlib.suppress(FileNotFoundError), retryable_oserrors(folder):
        return sorted(int(path.name.removeprefix("step-")) for path in find_steps(folder) if is_published(path))
    return []


def find_steps(folder: Path) -> list[Path]:
    """Find the folders with the name of a checkpoint, published or not. If `folder` does not exist, there are none.

    Raises: OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return []


def is_published(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def find_leftovers(folder: Path) -> dict[Path, str]:
    """Find the folders of saves and deletions that a crash interrupted. Map each to `save` or `deletion`."""
    prefixes = {"save": PARTIAL, "deletion": PRUNED}
    return {path: action for action, prefix in prefixes.items() for path in folder.glob(f"{prefix}*")}


def quarantine(folder: Path, prefix: str) -> Path:
    """Rename a checkpoint so that it is neither resumed nor counted by retention. Return its new path."""
    renamed = folder.with_name(f"{prefix}{folder.name}")
    with retryable_oserrors(folder):
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
    return renamed
