"""Decoders: advance a batch of rows by one token per step, in plain PyTorch or by a CUDA graph.

A row is one sequence. Rows do not affect each other, so a row of the batch can be replaced between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.language_model import MambaLM
from model.mamba import Cache, State
from pipeline.inference.requests import Sampling
from pipeline.inference.sampling import choose
from pipeline.inference.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class Rows:
    """States of some rows, and what the choice of their tokens depends on.

    cache        states after all tokens but the last
    tokens       last token of each row [b]
    keys         `request_key` of each row [b]
    positions    number of tokens that each row has generated, including the last [b]
    """

    cache: Cache
    tokens: Tensor
    keys: Tensor
    positions: Tensor


class Decoder:
    """Decoder of a fixed number of rows.

    Args:
        llm: Language model.
        batch: Number of rows; every step advances all of them.
        sampling: How the next token is chosen.
        state_dtype: Type in which the states of the scans are kept; arithmetic is fp32.
    """

    cache: Cache
    tokens: Tensor

    def __init__(self, llm: MambaLM, batch: int, sampling: Sampling, state_dtype: torch.dtype) -> None:
        self.llm, self.batch, self.sampling, self.state_dtype = llm, batch, sampling, state_dtype
        device = llm.backbone.embedding.weight.device
        self.keys, self.positions = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Advance every row by one token. Return the logits [batch, vocab], and choose `self.tokens` from them.

        Args:
            tokens: Token of each row [batch]; None: the tokens that the previous step chose.
        """
        raise NotImplementedError

    def put(self, slots: Sequence[int], rows: Rows) -> None:
        """Replace the rows `slots`."""
        index = to_device(slots, self.keys.device)
        pairs = [(getattr(self, name), getattr(rows, name)) for name in ("tokens", "keys", "positions")]
        for own, given in zip(self.cache, rows.cache, strict=True):
            pairs += zip(own, given, strict=True)
        for buffer, values in pairs:
            buffer.index_copy_(0, index, values.to(buffer.dtype))

    def take(self, slots: Sequence[int]) -> Rows:
        """Copy the rows `slots`."""
        index = to_device(slots, self.keys.device)
        return Rows(
            cache=[State(*(part[index] for part in state)) for state in self.cache],
            tokens=self.tokens[index],
            keys=self.keys[index],
            positions=self.positions[index],
        )

    def _choose(self, logits: Tensor) -> Tensor:
        tokens = choose(logits, self.sampling, self.keys, self.positions)
        self.positions += 1
        return tokens


class EagerDecoder(Decoder):
    """Decoder in plain PyTorch, for any device and model."""

    def __init__(self, llm: MambaLM, batch: int, sampling: Sampling, state_dtype: torch.dtype) -> None:
        super().__init__(llm, batch, sampling, state_dtype)
        self.cache, self.tokens = llm.empty_cache(batch, state_dtype), torch.zeros_like(self.keys)

    def step(self, tokens: Tensor | None = None) -> Tensor:
        exact = [State(state.conv, state.ssm.float()) for state in self.cache]  # no copies if the states are fp32
        logits = self.llm.decode(self.tokens if tokens is None else tokens, exact)
        if self.state_dtype != torch.float32:
            for own, new in zip(self.cache, exact, strict=True):
                own.ssm.copy_(new.ssm)
        self.tokens = self._choose(logits)
        return logits


class GraphDecoder(Decoder):
    """Decoder with fused kernels, whose step is one CUDA graph that includes the choice of the tokens."""

    def __init__(self, llm: MambaLM, batch: int, sampling: Sampling, state_dtype: torch.dtype) -> None:
        from model.kernels.decode_graph import DecodeGraph  # needs Triton

        super().__init__(llm, batch, sampling, state_dtype)
        chooser = None if sampling.temperature == 0 else self._choose
        self.graph = DecodeGraph(llm, batch, state_dtype=state_dtype, choose=chooser)
        self.cache, self.tokens = self.graph.cache, self.graph.tokens

    def step(self, tokens: Tensor | None = None) -> Tensor:
        return self.graph.step(tokens)
