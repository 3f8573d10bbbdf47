"""Interface of the implementations that are timed, and the prompt and the transferred bytes that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import MambaConfig, VisionConfig

Mark = Callable[[str], None]
IMAGE, PROMPT, TOKEN, ALL_TOKENS = "image", "prompt", "token", "all tokens"
QUESTION = "Describe this image in detail"  # the prompt of the paper's latency table
TEXT_TOKENS = 20  # length of the text prompt where there is no tokenizer: this question and a chat template


class Contender(Protocol):
    """An implementation to time, with a fixed model, batch size and maximum number of generated tokens.

    bytes_per_step    bytes that decoding one token for the whole batch must transfer
    prompt_tokens     positions of the prompt: image and text
    """

    bytes_per_step: int
    prompt_tokens: int

    def answer(self, tokens: int, mark: Mark) -> None:
        """Generate this number of tokens for every row of the batch, without stopping early.

        Call `mark` with IMAGE after the image encoders, with PROMPT after the prompt, which gives the first token, and
        with TOKEN after each further token. The rows may be prefilled in several parts. An implementation that cannot
        be interrupted after each token calls `mark` once, with ALL_TOKENS, after the last token.
        """


def random_images(vision: VisionConfig, batch: int, device: torch.device) -> Tensor:
    """Return uint8 pixels [b, 3, height, width]."""
    return torch.randint(256, (batch, 3, vision.image_px, vision.image_px), dtype=torch.uint8, device=device)


def bytes_per_step(llm: nn.Module, config: MambaConfig, batch: int, state_dtype: torch.dtype) -> int:
    """Return the bytes that a step of a Mamba language model must transfer.

    Every weight is read once. The states of the convolution and of the scan are read and written once for each row.
    """
    weights = list(llm.parameters())  # lists the tied head and embedding once
    channels = config.d_inner + (2 * config.num_groups * config.d_state if config.kind == "mamba2" else 0)
    conv = channels * (config.d_conv - 1) * weights[0].element_size()
    scan = config.d_inner * config.d_state * state_dtype.itemsize
    return sum(weight.nbytes for weight in weights) + 2 * batch * config.num_layers * (conv + scan)
