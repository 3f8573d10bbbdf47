"""Progress lines with rate and time left."""

from __future__ import annotations

import time
from datetime import timedelta

REPORT_EVERY_S = 5.0


class Progress:
    """Prints how many answers of a benchmark are known, every few seconds and at the end.

    Args:
        done: Number of answers that were known at the start. They do not count for the rate.
    """

    def __init__(self, name: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self.done_before = done
        self.started = self.last_print = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or (now - self.last_print < REPORT_EVERY_S and done < self.total):
            return
        self.last_print = now
        rate = (done - self.done_before) / max(now - self.started, 1e-9)
        left = timedelta(seconds=round((self.total - done) / rate))
        print(f"{self.name:<15} {done}/{self.total} answers  {rate:.1f}/s  {left} left", flush=True)
