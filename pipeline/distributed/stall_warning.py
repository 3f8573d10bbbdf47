"""Says so while something takes too long: what never comes back cannot tell afterwards."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_S = 10.0
POLL_S = 0.25


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Patience:
    """A thread that looks at what this process is waiting for, and says so once it has taken `limit_s`."""

    def __init__(self, tell: Callable[[str], None] | None = None, limit_s: float | None = None):
        self.tell = say if tell is None else tell
        self.limit_s = SLOW_S if limit_s is None else limit_s
        self.waiting: tuple[Callable[[], str], float] | None = None
        self.thread: threading.Thread | None = None

    @contextmanager
    def during(self, what: Callable[[], str]) -> Iterator[list[float]]:
        """Around what may take long; the list then holds its seconds if it did. Not to be nested."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="patience", daemon=True)
            self.thread.start()
        begun, slow = time.monotonic(), list[float]()
        self.waiting = (what, begun)
        try:
            yield slow
        finally:
            self.waiting = None
            seconds = time.monotonic() - begun
            if seconds > self.limit_s:
                slow.append(seconds)
                self.tell(f"{what()} took {seconds:.0f} s")

    def _watch(self) -> None:
        told = None
        while True:
            time.sleep(POLL_S)
            waiting = self.waiting
            if waiting and waiting is not told and time.monotonic() - waiting[1] > self.limit_s:
                told = waiting
                self.tell(f"{waiting[0]()} takes longer than {self.limit_s:g} s; still waiting")
