"""Ask a trained model about a picture.

python -m pipeline.generate MODEL --image photo.jpg --prompt "What colour is the car?"
python -m pipeline.generate MODEL --prompt "Name three rivers."                        # no picture
python -m pipeline.generate MODEL --image photo.jpg                                    # a dialogue; empty line ends it
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.errors import UserError, run_cli
from model.weights import LoadedModel, load_model
from preprocess.images.codec import read_image_file
from preprocess.prompts import Conversation, Tokenizer, encode_prompt, load_tokenizer

Pixels = npt.NDArray[np.uint8]


def answer(
    model: LoadedModel,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    pixels: Sequence[Pixels | None],
    max_new_tokens: int = 64,
) -> list[str]:
    """One greedy answer to each question about its picture ([h, w, 3], or None), in the order asked."""
    prompts = [
        encode_prompt([{"from": "human", "value": question}], model.config.template, tokenizer)
        for question in questions
    ]
    return complete(model, tokenizer, prompts, pixels, max_new_tokens)


def complete(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    pixels: Sequence[Pixels | None],
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt. Prompts of one length run together: padding would enter the state."""
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (prompt, picture) in enumerate(zip(prompts, pixels, strict=True)):
        groups[len(prompt), picture is not None].append(i)
    answers = [""] * len(prompts)
    for rows in groups.values():
        pictures = [picture for picture in (pixels[i] for i in rows) if picture is not None]
        tokens = torch.tensor([prompts[i] for i in rows], device=model.device)
        for i, ids in zip(rows, _greedy(model, tokens, pictures, tokenizer.eos_id, max_new_tokens), strict=True):
            answers[i] = tokenizer.decode(ids).strip()
    return answers


@torch.inference_mode()
def _greedy(
    model: LoadedModel, tokens: torch.Tensor, pictures: list[Pixels], eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Token ids after each prompt, up to and without the end of text. The state makes every token cost the same."""
    features = None
    if pictures:
        stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(model.device)
        features = model.towers(stacked)
    logits, cache = model.emma.prefill(tokens, features)
    chosen = [logits.argmax(-1)]
    for _ in range(max_new_tokens - 1):
        if all((torch.stack(chosen, 1) == eos_id).any(1)):
            break
        chosen.append(model.emma.decode(chosen[-1][:, None], cache).argmax(-1))
    return [_until(row, eos_id) for row in torch.stack(chosen, 1).tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def load(folder: str | Path, device: str = "auto") -> tuple[LoadedModel, Tokenizer]:
    """An exported model and its tokenizer. Raises: UserError if the folder holds no model."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_model(Path(folder), torch.device(device), dtype), load_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that pipeline.export wrote")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--prompt", help="one question; without it, a dialogue on the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    model, tokenizer = load(args.model, args.device)
    picture = read_image_file(args.image, model.config.vision.image_px) if args.image else None
    turns: list[dict[str, str]] = []
    for question in [args.prompt] if args.prompt is not None else iter(_ask_user, ""):
        turns.append({"from": "human", "value": question})
        said = _reply(model, tokenizer, turns, picture, args.max_new_tokens)
        turns.append({"from": "gpt", "value": said})
        print(said, flush=True)


def _ask_user() -> str:
    """Read one question from the terminal. Return an empty string at the end of the input or on Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _reply(
    model: LoadedModel, tokenizer: Tokenizer, turns: Conversation, picture: Pixels | None, max_new_tokens: int
) -> str:
    prompt = encode_prompt(turns, model.config.template, tokenizer)
    return complete(model, tokenizer, [prompt], [picture], max_new_tokens)[0]


if __name__ == "__main__":
    run_cli(main)
