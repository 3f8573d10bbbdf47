"""Training timers: start-up phases, the frozen towers, and garbage collection, which this module also schedules."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

COLLECT_EVERY = 50  # number of steps between collections


class GarbageCollection:
    """Context manager that collects garbage at the same steps on all ranks, and times it.

    Automatic collection would stop each rank at a different step, and every stop would delay all ranks.
    """

    def __enter__(self) -> GarbageCollection:
        self.seconds = 0.0
        gc.collect()
        gc.freeze()  # the model and the engine live until the end, so later collections can skip them
        gc.disable()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.enable()
        gc.unfreeze()

    def after_step(self, step: int) -> None:
        """Collect garbage if it is due. Must be called on every rank after every step."""
        if step % COLLECT_EVERY == 0:
            begun = time.perf_counter()
            gc.collect()
            self.seconds += time.perf_counter() - begun

    def pop_seconds(self) -> float:
        """Return the seconds of garbage collection since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class TowerTimer:
    """Time the frozen towers on this rank's device, to find slow ranks.

    The towers do the same work on every rank and run without a collective, so a long time means a slow device. The
    time of a whole step is nearly the same on all ranks, because the fast ranks wait for the slow ones.
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
        """Return the time, on a GPU as an event in its stream, because the host runs ahead of the device."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pop_seconds(self) -> float:
        """Return the seconds that the towers ran since the last call. The device must have finished the work."""
        laps, self.laps = self.laps, []
        if self.on_gpu:
            return sum(begun.elapsed_time(ended) for begun, ended in laps) / 1000
        return sum(ended - begun for begun, ended in laps)


def process_start_time() -> float:
    """Return when this process started, in seconds since 1970.

    This time is before the first import, because imports can take long from a shared file system.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


class StartupTimer:
    """Time the consecutive phases of a launch, beginning when the process started."""

    def __init__(self) -> None:
        self.began = self._last = process_start_time()
        self.seconds: dict[str, float] = {}

    def phase_done(self, phase: str) -> None:
        """End `phase` and begin the next one."""
        now = time.time()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{self._last - self.began:.1f} s after the process started: {parts}"
