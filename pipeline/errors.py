"""Files of a training, beside what shards do already: JSON that is whole or absent, large files, and what a file system
that fails is called."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError

OSERROR_REMEDIES = {  # to try again would not help
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


class RetryableError(RuntimeError):
    """This rank's data did not come, though they may be sound: the same command may well succeed elsewhere."""


def explained(error: OSError, where: Path | str = "") -> UserError | RetryableError:
    """What people must see to, or else may come right by itself. `where`, if the error does not say."""
    told = ": ".join(str(word) for word in (error.filename or where, error.strerror or error) if word)
    if remedy := OSERROR_REMEDIES.get(error.errno or 0):
        return UserError(f"{told}; {remedy}, and run the same command again")
    return RetryableError(f"{told}, on {socket.gethostname()}")


@contextmanager
def explaining(where: Path | str) -> Iterator[None]:
    """Raises: for each OSError what `explained` makes of it; reading and writing, unlike opening, name no file."""
    try:
        yield
    except OSError as error:
        raise explained(error, where) from error


@contextmanager
def retryable_io_errors(what: str) -> Iterator[None]:
    """A file that is missing says something about what is there; any other error says that one could not look.

    Raises: FileNotFoundError; RetryableError for every other OSError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RetryableError(f"{what}: the file system of {socket.gethostname()} fails ({error})") from error
