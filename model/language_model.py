"""A stack of Mamba blocks that hands over tapped depths, and the language model on top of one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import MambaConfig
from model.mamba import Cache, MambaBlock, RMSNorm

Tap = Literal["mixer", "residual"]


class Segment(NamedTuple):
    """Layers `start` to `stop - 1`; in backward they are recomputed from the segment's input, or were kept."""

    start: int
    stop: int
    recompute: bool


def plan_segments(num_layers: int, taps: Sequence[int], segment_layers: int, keep_layers: int) -> list[Segment]:
    """Segments of at most `segment_layers` (0: nothing is recomputed) that end at each tap; last layers are kept."""
    kept_from = num_layers - keep_layers if segment_layers else 0
    bounds = sorted({0, *(tap + 1 for tap in taps), max(kept_from, 0), num_layers})
    segments = []
    for start, stop in itertools.pairwise(bounds):
        recompute = stop <= kept_from
        longest = segment_layers if recompute else stop - start
        segments += [Segment(i, min(i + longest, stop), recompute) for i in range(start, stop, longest)]
    return segments


class MambaStack(nn.Module):
    """`num_layers` blocks and a final norm.

    segment_layers   0: every activation is kept; k: at most k layers are recomputed together in backward
    keep_layers      that many last layers are not recomputed all the same, where memory is left over
    """

    layers: Sequence[MambaBlock]

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.segment_layers = self.keep_layers = 0
        with torch.no_grad():  # the residual stream of a deep stack starts at the variance of a shallow one
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.num_layers)

    def forward(
        self, x: Tensor, taps: Sequence[int] = (), tap: Tap = "mixer"
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # [b, l, d] -> [b, l, d], [b, l, d] per tap
        """The final normed state and, for each tapped layer, its mixer's branch or the residual stream after it.

        A recomputed segment returns its tapped state and ends with its last layer: nothing is captured from inside, for
        a hook there would fire twice, and ZeRO-3 would release the last layer's weights under a longer replay.
        """
        hidden, residual, tapped = x, None, []
        for segment in plan_segments(len(self.layers), taps, self.segment_layers, self.keep_layers):
            if segment.recompute and torch.is_grad_enabled():
                run: Callable[..., Any] = self._checkpointed
            else:
                run = self._run
            hidden, residual = run(segment.start, segment.stop, hidden, residual)
            if segment.stop - 1 in taps:
                tapped.append(hidden if tap == "mixer" else (hidden + residual).to(hidden.dtype))
        return self.norm_f(hidden, residual)[0], tuple(tapped)

    def _run(self, start: int, stop: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for layer in self.layers[start:stop]:
            hidden, residual = layer(hidden, residual)
        return hidden, residual

    def _checkpointed(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        return checkpoint(self._run, *arguments, use_reentrant=False, preserve_rng_state=False)

    def prefill(self, x: Tensor) -> tuple[Tensor, Cache]:
        """`forward` for generation: the final state of the last position [b, d], and every layer's state after it."""
        hidden, residual, cache = x, None, []
        for layer in self.layers:
            hidden, residual, state = layer.prefill(hidden, residual)
            cache.append(state)
        return self._last(hidden, residual), cache

    def step(self, x: Tensor, cache: Cache) -> Tensor:  # [b, d] -> [b, d]
        """The final state of one more position; `cache` moves on in place."""
        hidden, residual = x, None
        for layer, state in zip(self.layers, cache, strict=True):
            hidden, residual = layer.step(hidden, residual, state)
        return self.norm_f(hidden, residual)[0]

    def _last(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return self.norm_f(hidden[:, -1].contiguous(), None if residual is None else residual[:, -1].contiguous())[0]


class Backbone(MambaStack):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)


class MambaLM(nn.Module):
    """A Mamba language model, called on embeddings, since a picture precedes the text. The head is the embedding."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.lm_head.weight = self.backbone.embedding.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MambaLM:
        """`to_empty` of a module on the meta device would untie the weights."""
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def embed(self, tokens: Tensor) -> Tensor:  # [b, t] -> [b, t, d]
        return self.backbone.embedding(tokens)

    def head(self, hidden: Tensor) -> Tensor:  # [..., d] -> [..., vocab]
        return self.lm_head(hidden)

    def forward(
        self, x: Tensor, taps: Sequence[int] = (), tap: Tap = "mixer"
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # [b, l, d] -> [b, l, d], [b, l, d] per tap
        return self.backbone(x, taps, tap)

    def prefill(self, x: Tensor) -> tuple[Tensor, Cache]:  # [b, l, d] -> [b, vocab]
        hidden, cache = self.backbone.prefill(x)
        return self.head(hidden), cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:  # [b] -> [b, vocab]
        return self.head(self.backbone.step(self.embed(tokens), cache))

    @property
    def segment_layers(self) -> int:
        return self.backbone.segment_layers

    @segment_layers.setter
    def segment_layers(self, value: int) -> None:
        self.backbone.segment_layers = value

    @property
    def keep_layers(self) -> int:
        return self.backbone.keep_layers

    @keep_layers.setter
    def keep_layers(self, value: int) -> None:
        self.backbone.keep_layers = value
