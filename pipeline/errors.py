"""Errors of training: retryable failures, and the conversion of OSError to a user error or a retryable failure."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import CommandError, ExitCode, UserError, oserror_remedy, oserror_text

# Exit code of a training process after an unexpected error: the one with which Python itself exits after a traceback.
# In a command that checks data, 1 means `ExitCode.DAMAGED`; training does not use that code.
CRASHED = 1


class RetryableError(CommandError, RuntimeError):
    """Transient failure, such as of a disk or of a node: running the same command again may succeed."""

    exit_code = ExitCode.RETRY


def from_oserror(error: OSError, path: Path | str = "") -> UserError | RetryableError:
    """Convert an OSError to a UserError if the user can fix the cause, otherwise to a RetryableError.

    Args:
        path: used in the message if the error itself names no file, as errors of read and write calls do not.
    """
    message = oserror_text(error, path)
    if remedy := oserror_remedy(error):
        return UserError(f"{message}; {remedy}, and run the same command again")
    return RetryableError(f"{message}, on {socket.gethostname()}")


@contextmanager
def convert_oserrors(path: Path | str) -> Iterator[None]:
    """Convert an OSError inside the block with `from_oserror`, and raise the result."""
    try:
        yield
    except OSError as error:
        raise from_oserror(error, path) from error


@contextmanager
def retryable_oserrors(path: Path | str) -> Iterator[None]:
    """Convert an OSError inside the block to RetryableError, or to UserError if the user can fix the cause.

    FileNotFoundError is not converted. A missing file shows that the data is incomplete, whereas after any other error
    the state of the data is unknown.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(known := from_oserror(error, path), UserError):
            raise known from error
        raise RetryableError(f"{path}: the file system of {socket.gethostname()} fails ({error})") from error
