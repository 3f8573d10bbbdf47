"""The demo's raw data, written as the real sets come: three annotation formats, folders of pictures, and some dirt.

    python -m preprocess.demo.mix runs/demo/raw          # then build_shards.py preprocess/mixes/demo.toml --root …

Deterministic: the same version writes the same bytes. `held_out/` is in no annotation file: it is what a trained model
is asked about. Its pictures are compared with every scene of the training data, so none of them was ever seen.
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

from model.errors import UserError, run_cli
from model.presets import preset
from preprocess.demo.damaged_rows import DAMAGED, REPAIRABLE, write_images
from preprocess.demo.scenes import Scene, draw_scenes, questions, render
from preprocess.demo.writing import PHOTOGRAPHS, Turns, text_dialogue
from preprocess.prompts import IMAGE_TOKEN, TEMPLATES

MODEL = "tiny_v2"
HELD_OUT = "held_out"
QUESTIONS = "questions.jsonl"
TOKENIZER = "tokenizer"

Row = dict[str, Any]
Drawn = tuple[Scene, Image.Image]


@dataclass(frozen=True)
class Sizes:
    """How many scenes each training source gets, how many are held out, and how many dialogues have no picture."""

    llava: int = 3200
    lvis: int = 1600
    lrv: int = 300
    held_out: int = 300
    text_only: int = 256


def write_mix(root: Path, sizes: Sizes | None = None) -> dict[str, int]:
    """Write everything under `root`, which must be empty or absent; the number of rows per source."""
    sizes = sizes or Sizes()
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise UserError(f"{root} is not empty; give a folder that is, or remove it")
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


def _distinct(scenes: Iterable[Scene], seen: set[bytes]) -> Iterator[Drawn]:
    """Scenes with their pictures, leaving out those whose picture has been there before."""
    for scene in scenes:
        picture = render(scene)
        pixels = picture.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            yield scene, picture


def _take(drawn: Iterator[Drawn], count: int) -> list[Drawn]:
    return [next(drawn) for _ in range(count)]


def _llava_rows(root: Path, drawn: Sequence[Drawn]) -> list[Row]:
    """Every question of a scene in one dialogue, in any order, the picture's token before the first."""
    rows = []
    for number, (scene, picture) in enumerate(drawn):
        name = _save(picture, root, f"scenes/llava/{number:06d}.jpg")
        rows.append(_dialogue(f"scene-{number}", name, _shuffled_turns(scene, name)))
    return rows


def _lvis_rows(root: Path, drawn: Sequence[Drawn]) -> list[Row]:
    """As LLaVA's rows, with the picture's token behind the first question."""
    rows = []
    for number, (scene, picture) in enumerate(drawn):
        name = _save(picture, root, f"scenes/lvis/{number:06d}.jpg")
        row = _dialogue(str(number), name, _shuffled_turns(scene, name))
        first = row["conversations"][0]
        first["value"] = first["value"].replace(f"{IMAGE_TOKEN}\n", "") + f"\n{IMAGE_TOKEN}"
        rows.append(row)
    return rows


def _lrv_rows(root: Path, drawn: Sequence[Drawn]) -> list[Row]:
    """One row per question: several rows share a picture, which they name without its suffix."""
    rows = []
    for number, (scene, picture) in enumerate(drawn):
        name = f"{number:06d}"
        _save(picture, root, f"lrv/lrv-vg/{name}.jpg")
        rows += [
            {"image_id": name, "question": asked.question, "answer": asked.answer, "task": asked.kind}
            for asked in questions(scene)
        ]
    return rows


def _shuffled_turns(scene: Scene, name: str) -> Turns:
    asked = questions(scene)
    random.Random(name).shuffle(asked)
    return tuple((each.question, each.answer) for each in asked)


def _write_held_out(folder: Path, drawn: Sequence[Drawn]) -> None:
    lines = []
    for number, (scene, picture) in enumerate(drawn):
        name = _save(picture, folder, f"{number:04d}.jpg")
        lines += [json.dumps({"image": name, **asdict(asked)}) + "\n" for asked in questions(scene)]
    (folder / QUESTIONS).write_text("".join(lines), encoding="utf-8")


def _save(picture: Image.Image, root: Path, name: str) -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95, subsampling=0)
    return name


# -- Photographs and text --------------------------------------------------------------------------------------------


def _photograph_rows(root: Path) -> list[Row]:
    shipped = importlib.resources.files("skimage") / "data"
    (root / "photographs").mkdir()
    rows = []
    for name, turns in PHOTOGRAPHS.items():
        (root / "photographs" / name).write_bytes((shipped / name).read_bytes())
        rows.append(_dialogue(Path(name).stem, f"photographs/{name}", turns))
    return rows


def _text_rows(count: int) -> list[Row]:
    """Without `image`, and with the empty `model` that LLaVA's text-only rows carry."""
    rng = random.Random("text only")
    return [{"model": "", **_dialogue(f"text-{number}", None, text_dialogue(rng))} for number in range(count)]


def _dialogue(row_id: str, picture: str | None, turns: Turns) -> Row:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        token = f"{IMAGE_TOKEN}\n" if picture and number == 0 else ""
        conversation += [{"from": "human", "value": token + question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({"image": picture} if picture else {}), "conversations": conversation}


# -- Tokenizer -------------------------------------------------------------------------------------------------------


def _texts(row: Row) -> Iterator[str]:
    """The pieces in which prompts.py tokenises a row."""
    turns = row.get("conversations") or [{"value": row["question"]}, {"value": row["answer"]}]
    for number, turn in enumerate(turns):
        text = turn["value"].replace(IMAGE_TOKEN, "").strip()
        yield text if number % 2 else _question(text)


def _question(text: str) -> str:
    template = TEMPLATES[preset(MODEL).template]
    return "".join(part.replace("{q}", text) for part in template if part)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """A byte-level BPE with a tiny model's number of entries, as a Hugging Face folder; ids 0 and 1 are GPT-NeoX's."""
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
    parser.add_argument("root", type=Path, help="an empty folder, or one to be made")
    root = parser.parse_args().root
    for name, rows in write_mix(root).items():
        print(f"{root / name}.json: {rows} rows")


if __name__ == "__main__":
    run_cli(main)
