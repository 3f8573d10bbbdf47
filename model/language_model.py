"""Stack of Mamba blocks that returns tapped states, and the Mamba language model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import MambaConfig, Tap
from model.mamba import Cache, MambaBlock, RMSNorm, State


class Segment(NamedTuple):
    """Layers `start` to `stop - 1`, whose activations are either kept or, in the backward pass, recomputed together."""

    start: int
    stop: int
    recompute: bool


def plan_segments(num_layers: int, taps: Sequence[int], *, segment_layers: int, keep_layers: int) -> list[Segment]:
    """Split the layers into segments for activation checkpointing. A segment ends after each tapped layer.

    Args:
        num_layers: Number of layers to split.
        taps: 0-based indices of the tapped layers.
        segment_layers: Largest number of layers that are recomputed together; 0: recompute none.
        keep_layers: Number of final layers that keep their activations.
    """
    kept_from = num_layers - keep_layers if segment_layers else 0
    bounds = sorted({0, *(tap + 1 for tap in taps), max(kept_from, 0), num_layers})
    segments = []
    for start, stop in itertools.pairwise(bounds):
        recompute = stop <= kept_from
        longest = segment_layers if recompute else stop - start
        segments += [Segment(i, min(i + longest, stop), recompute) for i in range(start, stop, longest)]
    return segments


class MambaStack(nn.Module):
    """Mamba blocks and a final norm.

    Attributes:
        segment_layers: Largest number of layers that are recomputed together in the backward pass; 0: recompute none.
        keep_layers: Number of final layers that keep their activations instead of recomputing them.
    """

    layers: Sequence[MambaBlock]

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.segment_layers = self.keep_layers = 0
        with torch.no_grad():  # keeps the variance of the residual stream independent of the depth
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.num_layers)

    def forward(
        self, x: Tensor, taps: Sequence[int] = (), tap: Tap = "mixer"
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # [b, l, d] -> [b, l, d], [b, l, d] per tap
        """Return the final normed state and the state of each tapped layer.

        Args:
            x: Embedded inputs [b, l, d].
            taps: 0-based indices of the tapped layers.
            tap: State to return: the output of the layer's mixer, or the residual stream after the layer.
        """
        # Tapped states are returned by segments instead of collected by hooks, because a hook would run again during
        # recomputation. A segment ends after a tapped layer, because otherwise ZeRO-3 would release the weights of this
        # layer during the recomputation.
        hidden, residual, tapped = x, None, []
        plan = plan_segments(len(self.layers), taps, segment_layers=self.segment_layers, keep_layers=self.keep_layers)
        for segment in plan:
            layers = (segment.start, segment.stop)
            if segment.recompute and torch.is_grad_enabled():
                hidden, residual = checkpoint(
                    self._run, *layers, hidden, residual, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, residual = self._run(*layers, hidden, residual)
            if segment.stop - 1 in taps:
                assert residual is not None
                tapped.append(hidden if tap == "mixer" else (hidden + residual).to(hidden.dtype))
        return self.norm_f(hidden, residual)[0], tuple(tapped)

    def _run(self, start: int, stop: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for layer in self.layers[start:stop]:
            hidden, residual = layer(hidden, residual)
        return hidden, residual

    def prefill(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Return the normed hidden state of the last position [b, d], and each layer's recurrent state after it.

        Args:
            x: Embedded inputs [b, l, d].
            mask: Which positions belong to a row's sequence [b, l]; the other positions are padding, which comes before
                the sequence. Padding has no effect on the results. None: there is no padding.
        """
        if mask is not None:
            mask = mask[..., None].to(x.dtype)
            x = x * mask  # a layer then maps zeros to zeros, so padding stays zero in every layer
        hidden, residual, cache = x, None, []
        for layer in self.layers:
            hidden, residual, state = layer.prefill(hidden, residual, mask)
            cache.append(state)
        last_residual = None if residual is None else residual[:, -1].contiguous()
        return self.norm_f(hidden[:, -1].contiguous(), last_residual)[0], cache

    def step(self, x: Tensor, cache: Cache) -> Tensor:  # [b, d] -> [b, d]
        """Return the final state of one more position, and update `cache` in place."""
        hidden, residual = x, None
        for layer, state in zip(self.layers, cache, strict=True):
            hidden, residual = layer.step(hidden, residual, state)
        return self.norm_f(hidden, residual)[0]


class Backbone(MambaStack):
    """Mamba stack with a token embedding, under mamba_ssm's parameter names."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)


class MambaLM(nn.Module):
    """Mamba language model. Its inputs are embeddings instead of token ids, because an image precedes the text.

    The head shares its weight with the token embedding.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.lm_head.weight = self.backbone.embedding.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MambaLM:
        """Tie the weights again, because `to_empty` on a module on the meta device unties them."""
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

    def prefill(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Cache]:  # [b, l, d] -> [b, vocab]
        """Return the logits after the last position and the states. `MambaStack.prefill` explains the mask."""
        hidden, cache = self.backbone.prefill(x, mask)
        return self.head(hidden), cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:  # [b] -> [b, vocab]
        return self.head(self.backbone.step(self.embed(tokens), cache))

    def empty_cache(self, batch: int, state_dtype: torch.dtype = torch.float32) -> Cache:
        """Allocate states of sequences that have no position yet."""
        config, weight = self.config, self.backbone.embedding.weight
        ssm = (config.num_heads, config.head_dim) if config.kind == "mamba2" else (config.d_inner,)
        shapes = [(layer.mixer.conv1d.in_channels, config.d_conv - 1) for layer in self.backbone.layers]
        return [
            State(
                weight.new_zeros(batch, *conv),
                weight.new_zeros(batch, *ssm, config.d_state, dtype=state_dtype),
            )
            for conv in shapes
        ]

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
