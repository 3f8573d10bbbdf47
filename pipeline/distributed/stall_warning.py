"""Warnings about slow operations, printed while they run, because an operation that hangs cannot report it later."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_S = 10.0
POLL_S = 0.25


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StallWarning:
    """Warns about an operation that takes longer than `limit_s`, once while it is running and once when it returns.

    Args:
        warn: Called with the text of each warning, also from a background thread.
    """

    def __init__(self, warn: Callable[[str], None] = print_to_stderr, limit_s: float = SLOW_S):
        self.warn, self.limit_s = warn, limit_s
        self.operation: tuple[Callable[[], str], float] | None = None  # description and start time
        self.thread: threading.Thread | None = None

    @contextmanager
    def warn_if_slow(self, describe: Callable[[], str]) -> Iterator[list[float]]:
        """Warn if the block is slow. Blocks must not be nested.

        Args:
            describe: Called when a warning is due. Returns the operation's description.

        Yields: An empty list. If the block is slow, its duration in seconds is appended when it ends.
        """
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="stall warning", daemon=True)
            self.thread.start()
        began, slow = time.monotonic(), list[float]()
        self.operation = (describe, began)
        try:
            yield slow
        finally:
            self.operation = None
            seconds = time.monotonic() - began
            if seconds > self.limit_s:
                slow.append(seconds)
                self.warn(f"{describe()} took {seconds:.0f} s")

    def _watch(self) -> None:
        warned_about = None
        while True:
            time.sleep(POLL_S)
            operation = self.operation
            if operation and operation is not warned_about and time.monotonic() - operation[1] > self.limit_s:
                warned_about = operation
                self.warn(f"{operation[0]()} takes longer than {self.limit_s:g} s; still waiting")
