"""Atomic files: written under a temporary name, synced, renamed; canonical JSON."""

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
    """A file that only grows, and knows the sha256 of what it holds. `published` closes it."""

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
    """A file that appears under its name when the block ends without an error, and never in part."""
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
    """Publishes the bytes; returns their sha256."""
    with published(path) as file:
        file.write(data)
    return file.sha256


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: Any, indent: int | None = 1) -> bytes:
    """The one spelling of a value: sorted keys, ASCII, a newline at the end. Without indent it is fast."""
    return json.dumps(value, sort_keys=True, indent=indent).encode() + b"\n"


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    publish(path, json.dumps(content, indent=indent, default=str).encode() + b"\n")


def sync(file: IO[bytes]) -> None:
    """Bring to disk what was written so far, and do not keep it in the page cache, which has better uses."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
