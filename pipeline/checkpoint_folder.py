"""A checkpoint's folder, seen from outside: whether its files are as they were written, and the names it takes on.

`step-00000500` is a checkpoint. With one of these words before it, it is on its way, or is none any more.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.elastic import bytes_of
from pipeline.files import lost_if_it_fails
from pipeline.snapshot import BLOCK_BYTES, THREADS
from preprocess.shards import file_sha256

PARTIAL = ".partial-"
PRUNED = ".pruned-"
REFUSED = ".refused-"  # something of it is damaged
DOUBTED = ".doubted-"  # nothing of it is, and yet the probe disagrees


def find_leftovers(folder: Path) -> dict[Path, str]:
    """What kills left behind, for the next start to remove -> what they cut off."""
    return {path: cut for cut, word in (("save", PARTIAL), ("deletion", PRUNED)) for path in folder.glob(f"{word}*")}


def set_aside(folder: Path, word: str) -> Path:
    """Take a checkpoint out of the way of its successor, and out of what retention counts; where it is then."""
    away = folder.with_name(f"{word}{folder.name}")
    with lost_if_it_fails(f"{folder}"):
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)
    return away


def first_damage(
    folder: Path, files: Mapping[str, dict[str, Any]], into: Mapping[str, torch.Tensor] | None = None
) -> str | None:
    """What is wrong with these files, if anything is. Those that `into` has memory for are read into it on the way.

    Raises: LostDataError if the file system fails.
    """
    memory = into or {}
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _damage(folder / name, files[name], memory.get(name)), files)
        return next(filter(None, found), None)


def _damage(path: Path, facts: dict[str, Any], memory: torch.Tensor | None) -> str | None:
    try:
        with lost_if_it_fails(f"{path}"):
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
