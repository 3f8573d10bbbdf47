"""EMMA: projector, Mamba language model, and the alignment that only training runs."""

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
    """Losses of each row, as sums and counts. The caller divides the sums by totals over the whole optimizer step."""

    text_nll: Tensor  # [b] fp32, negative log-likelihood summed over the row's supervised tokens
    text_tokens: Tensor  # [b] number of the row's supervised tokens
    align_error: Tensor | None  # [b] fp32, mean squared error of the image; None without image or alignment


class Emma(nn.Module):
    """The modules that are trained. The frozen vision towers are outside, so that ZeRO-3 does not shard them."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(config)
        self.llm = MambaLM(config.llm)
        self.alignment = Alignment(config) if config.alignment else None

    def forward(
        self, tokens: Tensor, targets: Tensor, features: Tensor | None = None, align_target: Tensor | None = None
    ) -> Losses:
        """Compute the training losses of one micro-batch. Either all of its rows have an image, or none of them has.

        Args:
            tokens: Token ids [b, t], padded on the right.
            targets: Token at each position of the text [b, t], or IGNORE_INDEX where there is no loss. Each token is
                predicted at the position before it, so the first token is predicted at the last patch.
            features: Features of the vision towers [b, n, v].
            align_target: Normalised values of each patch [b, n, values].
        """
        visual, text = self.embed(tokens, features)
        num_visual, x, alignment = visual.shape[1], torch.cat([visual, text], 1), self.config.alignment
        hidden, tapped = self.llm(x, alignment.taps, alignment.tap) if alignment else self.llm(x)

        predicting = hidden[:, max(num_visual - 1, 0) : -1]
        targets = targets[
            :, targets.shape[1] - predicting.shape[1] :
        ]  # without an image, the first token is not predicted
        supervised = targets != IGNORE_INDEX
        logits = self.llm.head(predicting[supervised])  # only supervised positions, since logits need most memory
        nll = torch.zeros(targets.shape, device=targets.device)
        nll[supervised] = token_nll(logits, targets[supervised])
        text_nll, text_tokens = nll.sum(1), supervised.sum(1)

        if self.alignment is None or align_target is None:
            return Losses(text_nll, text_tokens, None)
        levels = tuple(level[:, :num_visual] for level in (*tapped, hidden))
        return Losses(text_nll, text_tokens, self.alignment(levels, align_target))

    def embed(self, tokens: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:  # [b, n, d], [b, t, d]
        """Return the language model's inputs: projected features (with n = 0 if there is no image), embedded tokens."""
        text = self.llm.embed(tokens)
        visual = text[:, :0] if features is None else self.projector(features.to(text.dtype))
        return visual, text

    @torch.no_grad()
    def prefill(self, tokens: Tensor, features: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Return the logits [b, vocab] after a prompt and the cache for `decode`. All rows must be equally long."""
        return self.llm.prefill(torch.cat(self.embed(tokens, features), 1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:  # [b, 1] -> [b, vocab]
        """Return the logits after one more token, and update `cache` in place."""
        return self.llm.decode(tokens[:, 0], cache)

    def mixers(self) -> list[Mixer]:
        """Return all Mamba mixers. ZeRO-3 may gather each as one unit, since a forward pass calls it at most once."""
        return [module for module in self.modules() if isinstance(module, Mixer)]
