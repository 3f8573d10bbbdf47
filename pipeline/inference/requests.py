"""Requests to the inference engine, sampling settings, and completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature    divisor of the logits; 0: always choose the most likely token (greedy decoding)
    top_k          sample from the k most likely tokens only; 0: no limit
    top_p          sample from the fewest tokens whose probabilities add up to at least p; 1: no limit
    seed           the same seed gives the same answers
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.temperature >= 0, f"temperature is {self.temperature}, expected at least 0"
        assert self.top_k >= 0, f"top_k is {self.top_k}, expected at least 0"
        assert 0 < self.top_p <= 1, f"top_p is {self.top_p}, expected a value above 0 and at most 1"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete.

    prompt            token ids
    image             pixels at the model's size, which precede the prompt
    max_new_tokens    largest number of tokens to generate
    stop              strings that end the completion; the completion does not contain them
    draw              number that selects the random numbers of the completion, besides the seed; None: the position of
                      the request among the requests of the call
    """

    prompt: list[int]
    image: Pixels | None = None
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    draw: int | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Generated tokens without the end-of-text token, and their text without surrounding white space.

    finish_reason    "stop" after the end-of-text token or a stop string, "length" after `max_new_tokens` tokens
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
