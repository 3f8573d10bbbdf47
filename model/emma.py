"""EMMA: a projector, a Mamba language model that reads the picture first, and an alignment that only training runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.alignment import Alignment
from model.config import IGNORE_INDEX, EmmaConfig
from model.language_model import MambaLM
from model.mamba import Cache, Mixer
from model.projector import Projector
from model.text_loss import token_nll


class Losses(NamedTuple):
    """Sums and counts of each row, never means: the caller divides by the totals of the whole optimizer step."""

    text_nll: Tensor  # [b] fp32, -log p summed over the row's supervised tokens
    text_tokens: Tensor  # [b] how many those are
    align_error: Tensor | None  # [b] fp32, mean squared error of the image; None without image or alignment


class Emma(nn.Module):
    """Everything that trains. The frozen towers stay outside: ZeRO-3 would shard them and gather them every step."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(config)
        self.llm = MambaLM(config.llm)
        self.alignment = Alignment(config) if config.alignment else None

    def forward(
        self, tokens: Tensor, targets: Tensor, features: Tensor | None = None, align_target: Tensor | None = None
    ) -> Losses:
        """Training losses of one micro-batch, all of whose rows have a picture, or none.

        Shapes: tokens and targets [b, t]; features [b, n, v]; align_target [b, n, p]. Unless it is IGNORE_INDEX,
        targets[i, j] is the token at j, predicted from the position before it: the last patch predicts the text's
        first token.
        """
        visual, text = self.embed(tokens, features)
        num_visual = visual.shape[1]
        hidden, tapped = self._read(torch.cat([visual, text], 1))

        nll, counts = self._text_loss(hidden[:, max(num_visual - 1, 0) : -1], targets)
        if self.alignment is None or align_target is None:
            return Losses(nll, counts, None)
        levels = tuple(level[:, :num_visual] for level in (*tapped, hidden))
        return Losses(nll, counts, self.alignment(levels, align_target))

    def mixers(self) -> list[Mixer]:
        """Every Mamba mixer: what ZeRO-3 may gather as one, since each is called once per forward at most."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    @torch.no_grad()
    def prefill(self, tokens: Tensor, features: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Logits [b, vocab] after the prompt, and the state to go on from. No padding: rows are equally long."""
        return self.llm.prefill(torch.cat(self.embed(tokens, features), 1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:  # [b, 1] -> [b, vocab]
        """Logits after one more token; `cache` moves on in place, so a token costs the same at any length."""
        return self.llm.decode(tokens[:, 0], cache)

    def embed(self, tokens: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:  # [b, n, d], [b, t, d]
        """What the language model reads: the picture (n = 0 without one), then the text."""
        text = self.llm.embed(tokens)
        visual = text[:, :0] if features is None else self.projector(features.to(text.dtype))
        return visual, text

    def _read(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # [b, l, d] -> [b, l, d], [b, l, d] per tap
        alignment = self.config.alignment
        return self.llm(x, alignment.taps, alignment.tap) if alignment else self.llm(x)

    def _text_loss(self, predicting: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Per-row sums; the head sees supervised positions only, since its logits are the largest tensors of all."""
        targets = targets[:, targets.shape[1] - predicting.shape[1] :]  # text alone: nothing predicts its first token
        supervised = targets != IGNORE_INDEX
        logits = self.llm.head(predicting[supervised])  # [supervised tokens, vocab]
        nll = torch.zeros(targets.shape, device=targets.device)
        nll[supervised] = token_nll(logits, targets[supervised])
        return nll.sum(1), supervised.sum(1)
