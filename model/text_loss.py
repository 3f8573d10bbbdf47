"""Negative log-likelihood of text, computed in fp32 without an fp32 copy of all logits.

Such a copy would be the largest tensor of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # rows of logits that are converted to fp32 at a time


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:  # [tokens, vocab], [tokens] -> [tokens] fp32
    """Return -log softmax(logits)[target] of each row, computed in fp32."""
    return _TokenNll.apply(logits, targets)


class _TokenNll(torch.autograd.Function):
    """Save only the logits in their own type and log Σ exp(logits) of each row for the backward pass.

    The backward pass recomputes the softmax from them, a chunk of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalisers = torch.cat([chunk.float().logsumexp(1) for chunk in logits.split(CHUNK_ROWS)])
        ctx.save_for_backward(logits, targets, normalisers)
        return normalisers - logits.gather(1, targets[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalisers = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            p = torch.exp(logits[rows].float() - normalisers[rows, None])
            p[torch.arange(len(p), device=p.device), targets[rows]] -= 1
            grad_logits[rows] = p * grad[rows, None]
        return grad_logits, None
