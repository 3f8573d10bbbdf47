"""Handling of SIGTERM as an exception, so that it ends a build in the same way as Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """Raised when the process receives SIGTERM, for example from `ray job stop`, SLURM or `kill`."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at the first SIGTERM within the block, and ignore later ones."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


@contextlib.contextmanager
def restore_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler after a block that may install its own handler.

    Raises: Terminated if the block raises SystemExit, as such a handler may do.
    """
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise Terminated from None
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    raise Terminated
