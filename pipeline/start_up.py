"""Where the time between a process's start and its first step goes."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_began() -> float:
    """Seconds since 1970, before Python was loaded: imports from a shared file system can take long."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


class StartUp:
    """Seconds of one phase after the other, from the process's start on."""

    def __init__(self) -> None:
        self.began = self._last = process_began()
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> None:
        """`phase` ends now, and the next one begins."""
        now = time.time()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{self._last - self.began:.1f} s from the process's start: {parts}"
