"""Files of a training, beside what shards do already: JSON that is whole or absent, large files, and what a file system
that fails is called."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.shard_reader import LostDataError
from preprocess.shards import publish


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    publish(path, json.dumps(content, indent=indent, default=str).encode() + b"\n")


def sync(file: IO[bytes]) -> None:
    """Bring to disk what was written so far, and do not keep it in the page cache, which has better uses."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def lost_if_it_fails(what: str) -> Iterator[None]:
    """A file that is missing says something about what is there; any other error says that one could not look.

    Raises: FileNotFoundError; LostDataError for every other OSError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LostDataError(f"{what}: the file system of {socket.gethostname()} fails ({error})") from error
