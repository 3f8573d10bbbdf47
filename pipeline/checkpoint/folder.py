"""A checkpoint's folder, seen from outside: whether its files are as they were written, and the names it takes on.

`step-00000500` is a checkpoint. With one of these words before it, it is on its way, or is none any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from model.hashing import file_sha256
from pipeline.checkpoint.layout import bytes_of
from pipeline.checkpoint.snapshot import BLOCK_BYTES, THREADS
from pipeline.errors import RetryableError, retryable_oserrors
from preprocess.atomic import canonical_json

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
PRUNED = ".pruned-"
REFUSED = ".refused-"  # something of it is damaged
DOUBTED = ".doubted-"  # nothing of it is, and yet the probe disagrees


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, ascending; published means that the manifest is there.

    Raises: RetryableError if the file system fails.
    """
    with contextlib.suppress(FileNotFoundError), retryable_oserrors(f"{folder}"):
        return sorted(int(path.name.removeprefix("step-")) for path in find_steps(folder) if is_whole(path))
    return []


def find_steps(folder: Path) -> list[Path]:
    """Checkpoint folders by their names. Raises: OSError other than that there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return []


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was published and has its manifest still. Raises: OSError."""
    return (folder / MANIFEST).exists()


def find_leftovers(folder: Path) -> dict[Path, str]:
    """What kills left behind, for the next start to remove -> what they cut off."""
    return {path: cut for cut, word in (("save", PARTIAL), ("deletion", PRUNED)) for path in folder.glob(f"{word}*")}


def quarantine(folder: Path, word: str) -> Path:
    """Take a checkpoint out of the way of its successor, and out of what retention counts; where it is then."""
    away = folder.with_name(f"{word}{folder.name}")
    with retryable_oserrors(f"{folder}"):
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)
    return away


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: UserError if it is not there, or not as it was written; RetryableError if the file system fails."""
    try:
        with retryable_oserrors(f"{folder}"):
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest.pop("seal") != seal(manifest):
            raise ValueError("its seal does not fit")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST}: {error!r}") from None
    return manifest


def seal(manifest: dict[str, Any]) -> str:
    """Kept in the manifest: whatever bit of it flips, the two no longer fit."""
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or why one could not look; None if all files are as they were written down."""
    try:
        return first_damage(folder, read_manifest(folder)["files"])
    except (UserError, RetryableError) as error:
        return str(error)


def first_damage(
    folder: Path, files: Mapping[str, dict[str, Any]], into: Mapping[str, torch.Tensor] | None = None
) -> str | None:
    """What is wrong with these files, if anything is. Those that `into` has memory for are read into it on the way.

    Raises: RetryableError if the file system fails.
    """
    memory = into or {}
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _damage(folder / name, files[name], memory.get(name)), files)
        return next(filter(None, found), None)


def _damage(path: Path, facts: dict[str, Any], memory: torch.Tensor | None) -> str | None:
    try:
        with retryable_oserrors(f"{path}"):
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{path.name} has {size} bytes, expected {facts['bytes']}"
            if (file_sha256(path) if memory is None else _read_hashed(path, memory)) != facts["sha256"]:
                return f"{path.name} has changed: its sha256 is not the one that was written down"
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None


def _read_hashed(path: Path, memory: torch.Tensor) -> str:
    """Each block is hashed while it is still in the processor's cache."""
    data, digest, done = bytes_of(memory), hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(data[done : done + BLOCK_BYTES]):
            digest.update(data[done : done + count])
            done += count
    return digest.hexdigest()
