"""Prefill of a fixed batch size and length as a CUDA graph.

A graph is faster for small batches, because their kernels run in less time than the host needs to launch them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.language_model import MambaLM
from model.mamba import Cache

WARM_UPS = 2  # number of runs before the capture, because Triton compiles and autotunes its kernels when they first run


class PrefillGraph:
    """CUDA graph of `llm.prefill` for embeddings [batch, length, d].

    The graph shares the weights of the model. Do not replace the weight tensors while the graph is in use, because it
    has recorded their addresses.
    """

    def __init__(self, llm: MambaLM, batch: int, length: int) -> None:
        weight = llm.backbone.embedding.weight
        self.x = torch.zeros(batch, length, llm.config.d_model, dtype=weight.dtype, device=weight.device)
        stream = torch.cuda.Stream(weight.device)
        stream.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                llm.prefill(self.x)
        torch.cuda.current_stream(weight.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits, self.cache = llm.prefill(self.x)

    def __call__(self, x: Tensor) -> tuple[Tensor, Cache]:
        """Return the logits [b, vocab] and the states of the last position. The next call overwrites both."""
        self.x.copy_(x)
        self.graph.replay()
        return self.logits, self.cache
