"""Atomic file writes (temporary name, fsync, rename), and JSON with reproducible bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class HashingFile:
    """A write-only file that computes the sha256 of the data written to it. Opened and closed by `published`."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def published(path: Path) -> Iterator[HashingFile]:
    """Open a file for writing that appears under its name only if the block ends without an error.

    The file is written under a temporary name, synced to disk and then renamed to `path`, where it replaces an older
    file. Readers therefore never see a partial file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield HashingFile(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish(path: Path, data: bytes) -> str:
    """Write `data` to a file atomically. Return the sha256 of the data."""
    with published(path) as file:
        file.write(data)
    return file.sha256


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that creating, renaming or deleting files in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: Any, indent: int | None = 1) -> bytes:
    """Encode a value as JSON, so that equal values give equal bytes. Encoding is faster with `indent` None."""
    return json.dumps(value, sort_keys=True, indent=indent).encode() + b"\n"


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a value as JSON atomically. Values that JSON cannot represent are written as strings."""
    publish(path, json.dumps(content, indent=indent, default=str).encode() + b"\n")


def sync(file: IO[bytes]) -> None:
    """Sync the data written so far to disk, and drop it from the page cache, to leave the cache to training data."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
