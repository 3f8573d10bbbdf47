"""Time marks, the time of a call, and the memory bandwidth of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. A CPU has no work in flight."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Named time marks of one run. On a GPU, a mark is an event in the stream, so that marking does not wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self._marks: list[Any] = []

    def __call__(self, name: str) -> None:
        """Mark the end of the phase `name`."""
        self.names.append(name)
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[tuple[str, float]]:
        """Wait for the device, and return each mark's name and the time since the mark before it."""
        synchronize(self.device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            times = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            times = [end - start for start, end in pairs]
        return list(zip(self.names[1:], times, strict=True))


def seconds_per_call(
    call: Callable[[], Any],
    device: torch.device | None = None,
    *,
    at_least: float = 0.5,
    rounds: int = 3,
) -> float:
    """Return the median over `rounds` of the mean time of a call. Each round lasts about `at_least` seconds."""
    device = device or torch.device("cuda")
    for _ in range(3):
        call()
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    calls = max(3, int(at_least / (time.perf_counter() - begun)))
    means = []
    for _ in range(rounds):
        marks = Marks(device)
        marks("start")
        for _ in range(calls):
            call()
        marks("calls")
        [(_, seconds)] = marks.seconds()
        means.append(seconds / calls)
    return statistics.median(means)


def copy_bandwidth(device: torch.device | None = None) -> float:
    """Return the bytes per second that a large copy reads and writes: 4 GiB on a GPU, 64 MiB on a CPU."""
    device = device or torch.device("cuda")
    size = 4 << 30 if device.type == "cuda" else 64 << 20
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_per_call(lambda: target.copy_(source), device, at_least=0.2)
