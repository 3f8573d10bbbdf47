"""The demo's raw data: annotation files in the formats of the three real sources, image folders, and damaged rows.

    python -m preprocess.demo runs/demo/raw      # then build_shards.py preprocess/mixes/demo.toml --root runs/demo/raw

The same version of this module always writes the same bytes. The images in `held_out/` are for testing a trained model:
they are in no annotation file, and no training image has the same pixels.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.errors import UserError
from model.presets import preset
from preprocess.demo.damaged_rows import DAMAGED, REPAIRABLE, write_images
from preprocess.demo.scenes import Scene, draw_scenes, questions, render
from preprocess.demo.writing import Turns, photograph_dialogues, text_dialogue
from preprocess.prompts import IMAGE_TOKEN, TEMPLATES

MODEL = "tiny_v2"
HELD_OUT = "held_out"
QUESTIONS = "questions.jsonl"
TOKENIZER = "tokenizer"

Row = dict[str, Any]
RenderedScene = tuple[Scene, Image.Image]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Number of scenes in each training source and in the held-out set, and number of text-only dialogues."""

    llava: int = 3200
    lvis: int = 1600
    lrv: int = 300
    held_out: int = 300
    text_only: int = 256


def write_mix(root: Path, sizes: Sizes | None = None) -> dict[str, int]:
    """Write the raw data to `root` and return the number of rows by source. Raises: UserError if it is not empty."""
    sizes = sizes or Sizes()
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise UserError(f"{root} is not empty. Give another folder, or remove its contents")
    seen: set[bytes] = set()
    training = _distinct(draw_scenes("training"), seen)
    sources = {
        "llava": [
            *_llava_rows(root, _take(training, sizes.llava)),
            *_photograph_rows(root),
            *_text_rows(sizes.text_only),
        ],
        "lvis": _lvis_rows(root, _take(training, sizes.lvis)),
        "lrv": _lrv_rows(root, _take(training, sizes.lrv)),
    }
    texts = [text for rows in sources.values() for row in rows for text in _texts(row)]
    _write_held_out(root / HELD_OUT, _take(_distinct(draw_scenes("held out"), seen), sizes.held_out))
    write_images(root)
    for name, rows in sources.items():
        rows += [*REPAIRABLE[name], *(row for _, row in DAMAGED[name])]
        random.Random(name).shuffle(rows)
        (root / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    train_tokenizer(texts, root / TOKENIZER)
    return {name: len(rows) for name, rows in sources.items()}


# -- Scenes ----------------------------------------------------------------------------------------------------------


def _distinct(scenes: Iterable[Scene], seen: set[bytes]) -> Iterator[RenderedScene]:
    """Render the scenes. Skip scenes whose pixels are in `seen`, and add the pixels of all others to `seen`."""
    for scene in scenes:
        image = render(scene)
        pixels = image.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            yield scene, image


def _take(drawn: Iterator[RenderedScene], count: int) -> list[RenderedScene]:
    return [next(drawn) for _ in range(count)]


def _llava_rows(root: Path, drawn: Sequence[RenderedScene]) -> list[Row]:
    """Return one dialogue per scene, with its questions in random order and <image> before the first question."""
    rows = []
    for number, (scene, image) in enumerate(drawn):
        name = _save(image, root, f"scenes/llava/{number:06d}.jpg")
        rows.append(_dialogue(f"scene-{number}", name, _shuffled_turns(scene, name)))
    return rows


def _lvis_rows(root: Path, drawn: Sequence[RenderedScene]) -> list[Row]:
    """Return rows like LLaVA's, but with <image> after the first question."""
    rows = []
    for number, (scene, image) in enumerate(drawn):
        name = _save(image, root, f"scenes/lvis/{number:06d}.jpg")
        row = _dialogue(str(number), name, _shuffled_turns(scene, name))
        first = row["conversations"][0]
        first["value"] = first["value"].replace(f"{IMAGE_TOKEN}\n", "") + f"\n{IMAGE_TOKEN}"
        rows.append(row)
    return rows


def _lrv_rows(root: Path, drawn: Sequence[RenderedScene]) -> list[Row]:
    """Return one row per question. The rows of a scene name the same image, without its file suffix."""
    rows = []
    for number, (scene, image) in enumerate(drawn):
        name = f"{number:06d}"
        _save(image, root, f"lrv/lrv-vg/{name}.jpg")
        rows += [
            {"image_id": name, "question": asked.question, "answer": asked.answer, "task": asked.kind}
            for asked in questions(scene)
        ]
    return rows


def _shuffled_turns(scene: Scene, name: str) -> Turns:
    asked = questions(scene)
    random.Random(name).shuffle(asked)
    return tuple((each.question, each.answer) for each in asked)


def _write_held_out(folder: Path, drawn: Sequence[RenderedScene]) -> None:
    lines = []
    for number, (scene, image) in enumerate(drawn):
        name = _save(image, folder, f"{number:04d}.jpg")
        lines += [json.dumps({"image": name, **asdict(asked)}) + "\n" for asked in questions(scene)]
    (folder / QUESTIONS).write_text("".join(lines), encoding="utf-8")


def _save(image: Image.Image, root: Path, name: str) -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, subsampling=0)
    return name


# -- Photographs and text --------------------------------------------------------------------------------------------


def _photograph_rows(root: Path) -> list[Row]:
    source = importlib.resources.files("skimage") / "data"
    (root / "photographs").mkdir()
    rows = []
    for name, turns in photograph_dialogues().items():
        (root / "photographs" / name).write_bytes((source / name).read_bytes())
        rows.append(_dialogue(Path(name).stem, f"photographs/{name}", turns))
    return rows


def _text_rows(count: int) -> list[Row]:
    """Return text-only rows. Like LLaVA's text-only rows, they have no `image` and an empty `model`."""
    rng = random.Random("text only")
    return [{"model": "", **_dialogue(f"text-{number}", None, text_dialogue(rng))} for number in range(count)]


def _dialogue(row_id: str, image: str | None, turns: Turns) -> Row:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        token = f"{IMAGE_TOKEN}\n" if image and number == 0 else ""
        conversation += [{"from": "human", "value": token + question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({"image": image} if image else {}), "conversations": conversation}


# -- Tokenizer -------------------------------------------------------------------------------------------------------


def _texts(row: Row) -> Iterator[str]:
    """Yield the texts of a row as `preprocess.prompts` tokenizes them."""
    turns = row.get("conversations") or [{"value": row["question"]}, {"value": row["answer"]}]
    for number, turn in enumerate(turns):
        text = turn["value"].replace(IMAGE_TOKEN, "").strip()
        yield text if number % 2 else _question(text)


def _question(text: str) -> str:
    template = TEMPLATES[preset(MODEL).template]
    return "".join(part.replace("{q}", text) for part in template if part)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer for the tiny models and save it as a Hugging Face folder.

    Ids 0 and 1 are the end-of-text and padding tokens, as in the GPT-NeoX tokenizer.
    """
    specials = ["<|endoftext|>", "<|padding|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset(MODEL).llm.vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[0], "pad_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write to, which must be empty; created if it does not exist")
    root = parser.parse_args().root
    for name, rows in write_mix(root).items():
        print(f"{root / name}.json: {rows} rows")
