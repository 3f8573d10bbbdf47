"""What holds a rank up while it trains: garbage collection, and a device that is slower than the others."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

COLLECT_EVERY = 50  # steps


class GarbageCollection:
    """Context manager: garbage is collected at the same steps on all ranks.

    By itself Python would stop each rank at a moment of its own, and every stop would hold up all of them.
    """

    def __enter__(self) -> GarbageCollection:
        self.seconds = 0.0
        gc.collect()
        gc.freeze()  # the model and the engine stay: they need not be looked through again
        gc.disable()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.enable()
        gc.unfreeze()

    def after(self, step: int) -> None:
        """Every rank must call it after every step."""
        if step % COLLECT_EVERY == 0:
            begun = time.perf_counter()
            gc.collect()
            self.seconds += time.perf_counter() - begun

    def take(self) -> float:
        """Seconds since it was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class TowersClock:
    """Seconds that the frozen towers took on this rank's device.

    They tell a slow rank from one that waits: outside the engine, without a collective, the same work on every rank.
    """

    def __init__(self, towers: nn.Module, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []
        self.begun: Any = None
        towers.register_forward_pre_hook(self._begin)
        towers.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self.begun = self._now()

    def _end(self, *_: object) -> None:
        self.laps.append((self.begun, self._now()))

    def _now(self) -> Any:
        """On a GPU an event in its queue: the host runs ahead of the device."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Of the laps since it was last asked; the device must have finished them."""
        laps, self.laps = self.laps, []
        if self.on_gpu:
            return sum(begun.elapsed_time(ended) for begun, ended in laps) / 1000
        return sum(ended - begun for begun, ended in laps)


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
