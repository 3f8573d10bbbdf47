"""Capture of functions as CUDA graphs.

A CUDA graph is faster than launching kernels one by one if the kernels run in less time than the host needs to launch
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WARM_UPS = 2  # number of runs before the capture, because Triton compiles and autotunes its kernels when they first run


def capture(
    function: Callable[[], Result], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record the kernels of a function as a CUDA graph. Return the graph and the function's result.

    The function must read and write the same tensors in every call, because the graph records their addresses. Each
    replay overwrites the result.

    Args:
        function: Function to record.
        device: CUDA device of its tensors.
        pool: Memory pool (`torch.cuda.graph_pool_handle()`) for the tensors that the function allocates. Graphs may
            share a pool if each replay's results are used before another graph of the pool is replayed. None: a pool of
            its own.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class CapturedFunction:
    """CUDA graph of a function of tensors, for inputs of fixed shapes.

    Args:
        function: Function to record. `capture` states its conditions.
        inputs: Inputs of a call. Only their shapes and types matter.
        pool: Memory pool for the function's results; `capture` explains it.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, pool: Any = None) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph, self.result = capture(lambda: function(*self.inputs), inputs[0].device, pool)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the function's result. The next call overwrites it."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result
