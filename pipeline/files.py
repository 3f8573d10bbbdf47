"""Files of a training, beside what shards do already: JSON that is whole or absent, large files, and what a file system
that fails is called."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from model.errors import UserError
from pipeline.shard_reader import LostDataError
from preprocess.shards import publish

REMEDIES = {  # to try again would not help
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: "ask its owner for the right to it, or give another",
    errno.EPERM: "ask its owner for the right to it, or give another",
    errno.EROFS: "give a place that can be written",
    errno.ENOTDIR: "look at the path",
    errno.EISDIR: "look at the path",
    errno.ELOOP: "look at the path",
    errno.ENAMETOOLONG: "look at the path",
}


def explained(error: OSError, where: Path | str = "") -> UserError | LostDataError:
    """What people must see to, or else may come right by itself. `where`, if the error does not say."""
    told = ": ".join(str(word) for word in (error.filename or where, error.strerror or error) if word)
    if remedy := REMEDIES.get(error.errno or 0):
        return UserError(f"{told}; {remedy}, and run the same command again")
    return LostDataError(f"{told}, on {socket.gethostname()}")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    publish(path, json.dumps(content, indent=indent, default=str).encode() + b"\n")


def sync(file: IO[bytes]) -> None:
    """Bring to disk what was written so far, and do not keep it in the page cache, which has better uses."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def explaining(where: Path | str) -> Iterator[None]:
    """Raises: for each OSError what `explained` makes of it; reading and writing, unlike opening, name no file."""
    try:
        yield
    except OSError as error:
        raise explained(error, where) from error


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
