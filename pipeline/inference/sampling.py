"""Choice of the next token: greedy, or sampled with temperature, top-k and top-p.

A sampled token depends only on the seed, the request's number and the token's position, so a request has the same
answer in any batch. Everything is computed on the device without synchronisation, so a CUDA graph can record it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pipeline.inference.requests import Sampling

LOW_32 = 0xFFFFFFFF


def request_key(seed: int, draw: int) -> int:
    """Return the random key of a request, from which `uniform` derives the numbers of its positions."""
    return int.from_bytes(hashlib.sha256(f"{seed} {draw}".encode()).digest()[:4])


def choose(logits: Tensor, sampling: Sampling, keys: Tensor, positions: Tensor) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: Logits of the next token [b, vocab].
        sampling: How to choose.
        keys: The `request_key` of each row [b].
        positions: Number of tokens that each row has generated already [b].

    Returns: Token ids [b].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, tokens = _candidates(logits.float(), sampling)
    cumulative = values.cumsum(-1)
    if sampling.top_p < 1:  # keep a token if the more likely tokens have not reached top_p yet
        values = values * (cumulative - values < sampling.top_p * cumulative[:, -1:])
        cumulative = values.cumsum(-1)
    # Inverse of the cumulative distribution. The threshold is always below the last sum.
    threshold = uniform(keys, positions)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, threshold, right=True)
    return (found if tokens is None else tokens.gather(-1, found)).squeeze(-1)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities of the tokens to sample from, and the tokens; None: all tokens in order of their ids."""
    scaled = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        scaled, tokens = scaled.topk(sampling.top_k, -1)  # sorted
    elif sampling.top_p < 1:
        scaled, tokens = scaled.sort(-1, descending=True)
    else:
        return scaled.softmax(-1), None
    return scaled.softmax(-1), tokens


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Return a number in [0, 1) for each row, by hashing its key and its position. Shapes: [b] int64."""
    bits = keys + positions * 0xC2B2AE35
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finaliser of MurmurHash3
        bits = bits & LOW_32
        bits = (bits ^ (bits >> shift)) * factor
    return ((bits & LOW_32) >> 9).float() / 2**23  # with 23 bits, the product with a sum stays below the sum in fp32
