"""Verification of a checkpoint's files by size and sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from model.hashing import file_sha256
from pipeline.checkpoint.layout import bytes_of
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.snapshot import BLOCK_BYTES, THREADS
from pipeline.errors import RetryableError, retryable_oserrors


def find_damage(folder: Path) -> str | None:
    """Verify every file of a checkpoint. Describe the damage or the read error, or return None if it is intact."""
    try:
        return first_damage(folder, read_manifest(folder)["files"])
    except (UserError, RetryableError) as error:
        return str(error)


def first_damage(
    folder: Path, files: Mapping[str, dict[str, Any]], into: Mapping[str, torch.Tensor] | None = None
) -> str | None:
    """Verify the given files of a checkpoint. Describe the damage of the first damaged file, or return None.

    Args:
        files: the manifest's `bytes` and `sha256` by file name.
        into: tensors by file name, to be filled with the file's content, which is read for hashing anyway.

    Raises: RetryableError if the file system fails.
    """
    memory = into or {}
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = pool.map(lambda name: _damage(folder / name, files[name], memory.get(name)), files)
        return next(filter(None, outcomes), None)


def _damage(path: Path, expected: dict[str, Any], memory: torch.Tensor | None) -> str | None:
    try:
        with retryable_oserrors(path):
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{path.name} has {size} bytes, expected {expected['bytes']}"
            sha256 = file_sha256(path) if memory is None else read_and_hash(path, memory)
            if sha256 != expected["sha256"]:
                return f"{path.name} has changed: its sha256 does not match the manifest"
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None


def read_and_hash(path: Path, memory: torch.Tensor) -> str:
    """Read a file into `memory` and return its sha256. Each block is hashed while it is in the processor's cache."""
    data, digest, done = bytes_of(memory), hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(data[done : done + BLOCK_BYTES]):
            digest.update(data[done : done + count])
            done += count
    return digest.hexdigest()
