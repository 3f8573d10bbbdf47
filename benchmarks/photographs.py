"""Benchmark data: annotation rows and JPEGs of 640×480 pixels, which are crops of scikit-image's photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (640, 480)
WORDS = [
    "the",
    "a",
    "small",
    "red",
    "wooden",
    "table",
    "near",
    "window",
    "shows",
    "two",
    "people",
    "with",
    "dog",
    "umbrella",
]


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Write `count` different crops. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=1))
    originals = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in NAMES]
    paths = []
    for i in range(count):
        original = originals[i % len(originals)]
        left, top = rng.uniform(0, 0.3, 2) * original.size
        crop = (left, top, left + 0.7 * original.width, top + 0.7 * original.height)
        paths.append(folder / f"{i:06d}.jpg")
        original.resize(SIZE, Image.Resampling.LANCZOS, box=crop).save(paths[-1], quality=90)
    return paths


def dialogue(number: int, turns: int = 3, words: int = 40) -> list[dict[str, str]]:
    """Return a dialogue about as long as LLaVA's: short questions, and answers of `words` words."""
    rng = np.random.Generator(np.random.Philox(key=number))
    conversation = []
    for turn in range(turns):
        lead = "<image>\n" if turn == 0 else ""
        conversation.append({"from": "human", "value": f"{lead}What {_words(rng, 8)}?"})
        conversation.append({"from": "gpt", "value": f"{_words(rng, words).capitalize()}."})
    return conversation


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), count))


def write_rows(root: Path, images: int, rows_per_image: int, words: int = 40) -> list[dict[str, object]]:
    """Write images, an annotation file and a mix under `root`. Return the rows of the file."""
    names = [f"images/{path.name}" for path in write_photographs(root / "images", images)]
    rows: list[dict[str, object]] = [
        {"id": str(i), "image": names[i // rows_per_image], "conversations": dialogue(i, words=words)}
        for i in range(images * rows_per_image)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "mix.toml").write_text('[[source]]\nname = "rows"\nformat = "llava"\nannotations = "rows.json"\n')
    return rows
