"""Decoding: load an exported model and complete a batch of prompts, choosing the most likely token each time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.errors import UserError
from model.weights import LoadedModel, load_model
from preprocess.prompts import Tokenizer, encode_prompt, load_tokenizer

Pixels = npt.NDArray[np.uint8]


def load(folder: str | Path, device: str = "auto") -> tuple[LoadedModel, Tokenizer]:
    """Load an exported model and its tokenizer: bf16 on a GPU, fp32 on a CPU.

    Raises: UserError if the folder holds no model.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_model(Path(folder), torch.device(device), dtype), load_tokenizer(folder)


def answer(
    model: LoadedModel,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    images: Sequence[Pixels | None],
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer each question about its image (uint8 [h, w, 3], or None for text alone), in the given order."""
    prompts = [
        encode_prompt([{"from": "human", "value": question}], model.config.template, tokenizer)
        for question in questions
    ]
    return complete(model, tokenizer, prompts, images, max_new_tokens)


def complete(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    images: Sequence[Pixels | None],
    max_new_tokens: int,
) -> list[str]:
    """Return the greedy completion of each prompt.

    Only prompts of equal length run as one batch, because padding tokens would change the model's state.
    """
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        groups[len(prompt), image is not None].append(i)
    completions = [""] * len(prompts)
    for rows in groups.values():
        batch_images = [image for image in (images[i] for i in rows) if image is not None]
        tokens = torch.tensor([prompts[i] for i in rows], device=model.device)
        for i, ids in zip(rows, _greedy(model, tokens, batch_images, tokenizer.eos_id, max_new_tokens), strict=True):
            completions[i] = tokenizer.decode(ids).strip()
    return completions


@torch.inference_mode()
def _greedy(
    model: LoadedModel, tokens: torch.Tensor, images: list[Pixels], eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Return the token ids that follow each prompt, up to the end-of-text token, which is left out.

    The state has a fixed size, so every token takes the same time. Shapes: tokens [b, t].
    """
    features = None
    if images:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(model.device)  # [b, 3, h, w]
        features = model.towers(pixels)
    logits, cache = model.emma.prefill(tokens, features)
    chosen = [logits.argmax(-1)]
    for _ in range(max_new_tokens - 1):
        if all((torch.stack(chosen, 1) == eos_id).any(1)):
            break
        chosen.append(model.emma.decode(chosen[-1][:, None], cache).argmax(-1))
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in torch.stack(chosen, 1).tolist()]
