"""Prefill of a fixed batch size and length as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.cuda_graph import CapturedFunction
from model.language_model import MambaLM
from model.mamba import Cache


class PrefillGraph:
    """CUDA graph of `llm.prefill` for embeddings [batch, length, d].

    The graph shares the weights of the model. Do not replace the weight tensors while the graph is in use, because it
    has recorded their addresses.
    """

    def __init__(self, llm: MambaLM, batch: int, length: int) -> None:
        weight = llm.backbone.embedding.weight
        x = torch.zeros(batch, length, llm.config.d_model, dtype=weight.dtype, device=weight.device)
        self.captured = CapturedFunction(llm.prefill, x)

    def __call__(self, x: Tensor) -> tuple[Tensor, Cache]:
        """Return the logits [b, vocab] and the states of the last position. The next call overwrites both."""
        logits, cache = self.captured(x)
        return logits, cache
