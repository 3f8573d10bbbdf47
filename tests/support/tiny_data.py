"""A tiny data set, tokenizer and recipe for tests, and a function that builds a shard set from them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.launch import run_python

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


def write_byte_tokenizer(folder: Path, specials: tuple[str, ...] = ("<|endoftext|>", "<|padding|>")) -> Path:
    """Write a byte-level tokenizer in the published layout, with special tokens before the bytes.

    By default, these are the two special tokens of GPT-NeoX, at ids 0 and 1.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_raw_data(root: Path, num_images: int, num_text_only: int) -> Path:
    """Write images of coloured squares, dialogues about the images, and text-only dialogues. Return the mix file."""
    noise = np.random.Generator(np.random.Philox(key=5))
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(num_images):
        colour = list(COLOURS)[i % len(COLOURS)]
        pixels = np.full((60 + i, 80, 3), 128, np.uint8) + noise.integers(0, 30, (60 + i, 80, 3), np.uint8)
        pixels[10:40, 10 + i : 40 + i] = COLOURS[colour]
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhich colour?"), ("gpt", colour)] + [("human", "Sure?"), ("gpt", "Yes")] * (i % 3)
        rows.append({"id": f"p{i}", "image": f"{i}.png", "conversations": _turns(turns)})
    answers = [f"It is {'so ' * i}{i}." for i in range(num_text_only)]
    rows += [
        {"id": f"t{i}", "conversations": _turns([("human", f"Say {i}"), ("gpt", answer)])}
        for i, answer in enumerate(answers)
    ]
    (root / "dialogues.json").write_text(json.dumps(rows))
    mix = root / "mix.toml"
    source = 'name = "squares"\nformat = "llava"\nannotations = "dialogues.json"\nimages = "images"'
    mix.write_text(f"[[source]]\n{source}\nexpected_rows = {len(rows)}\n")
    return mix


def _turns(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def build_shards(mix: Path, out: Path, model: str = "tiny_v2") -> Path:
    """Build a shard set from the mix with a byte-level tokenizer. Return the folder of the set."""
    tokenizer = write_byte_tokenizer(mix.parent / "tokenizer")
    words: list[str | Path] = [mix, "--model", model, "--root", mix.parent, "--out", out, "--tokenizer", tokenizer]
    done = run_python("preprocess/build_shards.py", *words, "--samples-per-shard", "16", "--workers", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


TINY_RECIPE = """
model = "tiny_v2"
[data]
window = 2
workers = 0
[optim]
lr = 1e-3
global_batch = 8
micro_batch = 4
[checkpoint]
every_steps = 4
keep_last = 9
[engine]
ds_config = "ds_configs/zero3_small.json"
device = "cpu"
precision = "fp32"
segment_layers = 0
[log]
every_steps = 1
"""
