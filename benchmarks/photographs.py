"""Rows about real photographs, for the benchmarks: scikit-image's, cropped at many places, as JPEGs of 640×480."""

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
    """Every picture is another crop, and so another file."""
    folder.mkdir(parents=True, exist_ok=True)
    place = np.random.Generator(np.random.Philox(key=1))
    originals = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in NAMES]
    paths = []
    for i in range(count):
        original = originals[i % len(originals)]
        left, top = place.uniform(0, 0.3, 2) * original.size
        crop = (left, top, left + 0.7 * original.width, top + 0.7 * original.height)
        paths.append(folder / f"{i:06d}.jpg")
        original.resize(SIZE, Image.Resampling.LANCZOS, box=crop).save(paths[-1], quality=90)
    return paths


def dialogue(number: int, turns: int = 3, words: int = 40) -> list[dict[str, str]]:
    """About as long as LLaVA's: `turns` questions of a few words, and answers of about `words`."""
    draw = np.random.Generator(np.random.Philox(key=number))
    said = []
    for turn in range(turns):
        lead = "<image>\n" if turn == 0 else ""
        said.append({"from": "human", "value": f"{lead}What {_words(draw, 8)}?"})
        said.append({"from": "gpt", "value": f"{_words(draw, words).capitalize()}."})
    return said


def _words(draw: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), count))


def write_rows(root: Path, pictures: int, rows_per_picture: int) -> list[dict[str, object]]:
    """The pictures, an annotation file and a mix under `root`; the rows as they stand in the file."""
    names = [f"pictures/{path.name}" for path in write_photographs(root / "pictures", pictures)]
    rows: list[dict[str, object]] = [
        {"id": str(i), "image": names[i // rows_per_picture], "conversations": dialogue(i)}
        for i in range(pictures * rows_per_picture)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "mix.toml").write_text('[[source]]\nname = "rows"\nformat = "llava"\nannotations = "rows.json"\n')
    return rows
