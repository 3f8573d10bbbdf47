"""Prefill of prompts with and without images, left-padded to one length, with CUDA graphs for small batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.kernels.cuda_graph import CapturedFunction
from model.mamba import Cache, State
from model.weights import LoadedModel
from pipeline.inference.requests import Request
from pipeline.inference.transfer import to_device

# Small batches use CUDA graphs, because their kernels run in less time than the host needs to launch them.
MAX_GRAPH_POSITIONS, MAX_GRAPH_IMAGES = 8192, 8
LENGTH_STEP = 32  # lengths are rounded up to multiples of this, so that few graphs are captured
MAX_GRAPHS = 16


class Prefill:
    """Prefill of a batch of requests.

    Args:
        model: Model to run.
        state_dtype: Type in which the states of the scans are returned.
        use_graphs: Whether small batches use CUDA graphs.
        mark: Called with "image" after the visual tokens have been computed.
    """

    def __init__(
        self, model: LoadedModel, *, state_dtype: torch.dtype, use_graphs: bool, mark: Callable[[str], None]
    ) -> None:
        self.model, self.state_dtype, self.mark = model, state_dtype, mark
        self.graphs = _Graphs() if use_graphs else None
        self.states: dict[int, Cache] = {}  # by batch size; all graphs of a batch size write the same states

    def length(self, request: Request) -> int:
        """Return the number of positions of a request: its visual tokens and its text tokens."""
        return len(request.prompt) + (0 if request.image is None else self.model.config.vision.num_patches)

    def __call__(self, requests: Sequence[Request]) -> tuple[Tensor, Cache]:
        """Return the logits [b, vocab] after each prompt, and the states. The next call may overwrite both."""
        batch, length = len(requests), max(self.length(request) for request in requests)
        if self.graphs is None:
            return self.model.emma.llm.prefill(*self._embed(requests, batch, length))
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        if batch * length <= MAX_GRAPH_POSITIONS:
            padded = next_power_of_2(batch)
            logits = self.graphs(self._prefill_states, *self._embed(requests, padded, length))
            return logits[:batch], [State(*(part[:batch] for part in state)) for state in self._states(padded)]
        return self.model.emma.llm.prefill(*self._embed(requests, batch, length))

    def _embed(self, requests: Sequence[Request], batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the embedded requests [batch, length, d], padded on the left, and the mask of `MambaLM.prefill`."""
        device = self.model.device
        tokens = np.zeros((batch, length), np.int64)
        is_text, is_visual = np.zeros((2, batch, length), bool)
        for i, request in enumerate(requests):
            start = length - len(request.prompt)
            tokens[i, start:] = request.prompt
            is_text[i, start:] = True
            is_visual[i, length - self.length(request) : start] = True
        x = self.model.emma.llm.embed(to_device(tokens, device))
        images = [request.image for request in requests if request.image is not None]
        if images:
            positions = to_device(np.flatnonzero(is_visual), device)
            x.flatten(0, 1).index_copy_(0, positions, self._visual_tokens(images).flatten(0, 1))
            self.mark("image")
        return x, to_device(is_text | is_visual, device)

    def _visual_tokens(self, images: list[npt.NDArray[np.uint8]]) -> Tensor:  # [images, n, d]
        device = self.model.device
        if self.graphs is None or len(images) > MAX_GRAPH_IMAGES:
            return self._project(to_device(np.stack(images), device))
        padding = [images[0]] * (next_power_of_2(len(images)) - len(images))
        return self.graphs(self._project, to_device(np.stack([*images, *padding]), device))[: len(images)]

    def _project(self, pixels: Tensor) -> Tensor:  # uint8 [b, height, width, 3] -> [b, n, d]
        emma = self.model.emma
        features = self.model.towers(pixels.permute(0, 3, 1, 2))
        return emma.projector(features.to(emma.llm.backbone.embedding.weight.dtype))

    def _prefill_states(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the logits. Write the states into `self.states`, whose memory graphs of several lengths share."""
        logits, cache = self.model.emma.llm.prefill(x, mask)
        for own, given in zip(self._states(len(x)), cache, strict=True):
            own.conv.copy_(given.conv)
            own.ssm.copy_(given.ssm)
        return logits

    def _states(self, batch: int) -> Cache:
        if batch not in self.states:
            self.states[batch] = self.model.emma.llm.empty_cache(batch, self.state_dtype)
        return self.states[batch]


class _Graphs:
    """The most recently used CUDA graphs of functions, by shapes of their inputs.

    A function is captured when a shape comes up for the second time, because a capture takes longer than a call.
    """

    def __init__(self) -> None:
        self.captured: OrderedDict[Hashable, CapturedFunction] = OrderedDict()
        self.seen: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        key = (function.__name__, *(tensor.shape for tensor in inputs))
        if key not in self.seen:
            self.seen.add(key)
            return function(*inputs)
        if key not in self.captured:
            if len(self.captured) == MAX_GRAPHS:
                self.captured.popitem(last=False)
            self.captured[key] = CapturedFunction(function, *inputs, pool=self.pool)
        self.captured.move_to_end(key)
        return self.captured[key](*inputs)


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()
