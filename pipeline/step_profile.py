"""GPU time of a training step: the time in which any kernel runs, and the time of each kind of kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# A kernel has the first kind whose pattern occurs in its name, in lower case. All other kernels are elementwise.
KINDS = {
    "communication": r"nccl",
    "copies": r"memcpy|memset|copy_|catarray",
    "attention": r"flash|fmha|attention",
    "scan": r"scan|chunk_|state_passing|bmm_chunk",
    "conv1d": r"conv1d",
    "norm": r"norm",
    "optimizer": r"multi_tensor|adam",
    "matmul": r"gemm|nvjet|cutlass|xmma|matmul|splitk",
}


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """GPU time of one step in seconds. Kernels can overlap, so the kinds may add up to more than `busy_s`."""

    busy_s: float
    kernels: int
    seconds_by_kind: dict[str, float]


def profile_step(step: Callable[[], object]) -> StepProfile:
    """Run a step on the GPU under PyTorch's profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return summarise((event.name, event.time_range.start, event.time_range.end) for event in on_gpu)


def summarise(events: Iterable[tuple[str, float, float]]) -> StepProfile:
    """Summarise kernels, each given as its name and the microseconds at which it starts and ends."""
    seconds: dict[str, float] = defaultdict(float)
    busy, until, kernels = 0.0, float("-inf"), 0
    for name, start, end in sorted(events, key=lambda event: event[1]):
        seconds[kind_of(name)] += (end - start) / 1e6
        busy += max(0.0, end - max(start, until)) / 1e6
        until, kernels = max(until, end), kernels + 1
    by_size = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return StepProfile(busy_s=busy, kernels=kernels, seconds_by_kind=by_size)


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "elementwise")
