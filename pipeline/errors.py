"""Errors that training tells apart: mistakes of the user, and transient failures that a retry may fix."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import CommandError, ExitCode, UserError, oserror_remedy, oserror_text


class RetryableError(CommandError, RuntimeError):
    """Transient failure, such as of a disk or of a node: running the same command again may succeed."""

    exit_code = ExitCode.RETRY


def from_oserror(error: OSError, path: Path | str = "") -> UserError | RetryableError:
    """Turn an OSError into the error to raise: the user's if the user can fix it, otherwise a retryable one.

    Args:
        path: named in the message if the error names no file, as those of reading and writing do not.
    """
    message = oserror_text(error, path)
    if remedy := oserror_remedy(error):
        return UserError(f"{message}; {remedy}, and run the same command again")
    return RetryableError(f"{message}, on {socket.gethostname()}")


@contextmanager
def convert_oserrors(path: Path | str) -> Iterator[None]:
    """Raise what `from_oserror` returns for each OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, path) from error


@contextmanager
def retryable_oserrors(path: Path | str) -> Iterator[None]:
    """Raise RetryableError for each OSError inside the block, except FileNotFoundError.

    A missing file is a fact about the data, whereas any other error means that the data could not be examined.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RetryableError(f"{path}: the file system of {socket.gethostname()} fails ({error})") from error
