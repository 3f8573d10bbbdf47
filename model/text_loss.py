"""The text's negative log-likelihood in fp32, without fp32 logits: they would be the largest tensors of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # rows of logits that are in fp32 at once


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:  # [m, vocab], [m] -> [m] fp32
    """-log softmax(logits)[target] of each row, as if the logits were fp32."""
    return _TokenNll.apply(logits, targets)


class _TokenNll(torch.autograd.Function):
    """Keeps the logits as they are and their normalisers; the softmax is made again, chunk by chunk, in backward."""

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
