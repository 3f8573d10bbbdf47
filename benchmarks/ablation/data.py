"""Data of the ablation: scenes rendered to arrays, dialogues as token ids, and the questions of each split.

The splits are disjoint: "towers" trains the vision towers, "train" the models, "val" selects settings, and "test" is
asked only in the final runs. A scene depends only on its split and number, so every machine generates the same data.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ablation.configs import Size
from benchmarks.ablation.scenes import draw_scene, patch_labels, render
from model.config import IGNORE_INDEX, PAD_ID
from preprocess.atomic import write_json
from preprocess.demo.mix import train_tokenizer
from preprocess.demo.scenes import Question
from preprocess.prompts import TEMPLATES, Tokenizer, encode_dialogue, load_tokenizer

TEMPLATE = "base"
CHUNK = 64  # scenes per task of a worker process
TOKENIZER_SCENES = 2000
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Arrays of a split.

    Attributes:
        images: uint8 [images, h, w, 3].
        tokens, targets: int16 [images, t], padded on the right; targets are IGNORE_INDEX where not supervised.
        labels: bool [images, patches, labels], what each patch contains. Only for the split "towers".
        questions: The questions of each image.
    """

    images: Array
    tokens: Array
    targets: Array
    labels: Array
    questions: list[list[Question]]


def build(folder: Path, size: Size, processes: int) -> str:
    """Build all splits in `folder`, unless they are there. Return the sha256 of the data."""
    done = folder / "data.json"
    if done.exists():
        return json.loads(done.read_text())["sha256"]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        train_tokenizer(_words(), folder / "tokenizer")
    digest, seen = hashlib.sha256(json.dumps(size.images, sort_keys=True).encode()), set[bytes]()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for split, count in size.images.items():
            make = partial(_chunk, split, count, size.grid, folder / "tokenizer")
            starts = range(0, count, CHUNK)
            chunks = list(pool.map(make, starts) if processes > 1 else map(make, starts))
            hashes = [each for chunk in chunks for each in chunk.pop("hashes")]
            assert len({*hashes, *seen}) == len(hashes) + len(seen), f"an image of {split} occurs twice"
            seen.update(hashes)
            for each in hashes:
                digest.update(each)
            _save(folder, split, chunks)
    digest.update((folder / "tokenizer/tokenizer.json").read_bytes())
    write_json(done, {"sha256": digest.hexdigest(), "images": size.images})
    return digest.hexdigest()


def load(folder: Path, split: str) -> Split:
    """Load a split. The arrays stay on disk until they are used."""
    arrays = {name: np.load(folder / f"{split}-{name}.npy", mmap_mode="r") for name in ("images", "tokens", "targets")}
    labels = folder / f"{split}-labels.npy"
    questions = json.loads((folder / f"{split}-questions.json").read_text())
    return Split(
        **arrays,
        labels=np.load(labels, mmap_mode="r") if labels.exists() else np.zeros(0, np.bool_),
        questions=[[Question(**question) for question in asked] for asked in questions],
    )


def _words() -> list[str]:
    """Return texts to train the tokenizer on. Codes and numbers are removed, so that their characters stay tokens."""
    scenes = (draw_scene(random.Random(f"tokenizer {number}")) for number in range(TOKENIZER_SCENES))
    asked = [question for scene in scenes for question in scene.questions]
    [template] = TEMPLATES[TEMPLATE]
    assert template is not None
    texts = [text for each in asked for text in (template.replace("{q}", each.question), each.answer)]
    return [re.sub(r"\b[A-Z0-9]{2,}\b", "", text) for text in texts]


def _chunk(split: str, count: int, grid: int, tokenizer: Path, start: int) -> dict[str, Any]:
    """Draw, render and tokenize the scenes `start` to `start + CHUNK - 1` of a split."""
    encoder = _tokenizer(tokenizer)
    scenes = [draw_scene(random.Random(f"{split} {number}")) for number in range(start, min(start + CHUNK, count))]
    images = np.stack([render(scene, 14 * grid) for scene in scenes])
    return {
        "images": images,
        "rows": [_encode(scene.questions, encoder) for scene in scenes],
        "labels": np.stack([patch_labels(scene, grid) for scene in scenes]) if split == "towers" else None,
        "questions": [[asdict(question) for question in scene.questions] for scene in scenes],
        "hashes": [hashlib.sha256(image.tobytes()).digest() for image in images],
    }


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _encode(questions: Sequence[Question], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize the questions of a scene as one dialogue. Return its tokens and the spans of its answers."""
    turns = [
        {"from": speaker, "value": text}
        for asked in questions
        for speaker, text in (("human", asked.question), ("gpt", asked.answer))
    ]
    encoded = encode_dialogue(turns, TEMPLATE, tokenizer)
    return encoded.tokens, encoded.spans


def _save(folder: Path, split: str, chunks: list[dict[str, Any]]) -> None:
    rows = [row for chunk in chunks for row in chunk["rows"]]
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    tokens, targets = np.full(shape, PAD_ID, np.int16), np.full(shape, IGNORE_INDEX, np.int16)
    for i, (ids, spans) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        for start, end in spans:
            targets[i, start:end] = ids[start:end]
    np.save(folder / f"{split}-tokens.npy", tokens)
    np.save(folder / f"{split}-targets.npy", targets)
    np.save(folder / f"{split}-images.npy", np.concatenate([chunk["images"] for chunk in chunks]))
    if split == "towers":
        np.save(folder / f"{split}-labels.npy", np.concatenate([chunk["labels"] for chunk in chunks]))
    questions = [asked for chunk in chunks for asked in chunk["questions"]]
    (folder / f"{split}-questions.json").write_text(json.dumps(questions))
