"""Helpers that write test rows and mixes, and build shards from them in this process without Ray."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from model.errors import run_cli
from preprocess import build_shards
from preprocess.prompts import Tokenizer
from preprocess.shards.folder import ShardFolder

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "text")


def write_mix(root: Path, sources: list[dict[str, Any]], head: str = "") -> Path:
    """Write a mix file: the lines in `head`, and then one table per source. Return the path of the file."""
    root.mkdir(parents=True, exist_ok=True)
    tables = ["\n".join(["[[source]]", *(f"{key} = {_toml(value)}" for key, value in one.items())]) for one in sources]
    path = root / "mix.toml"
    path.write_text("\n\n".join([head, *tables]) + "\n")
    return path


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.data)
    return folder


def arguments(root: Path, out: Path, tokenizer: Tokenizer, model: str = "emma_v2", **options: Any) -> list[str]:
    """Return arguments for build_shards. Options become flags: `max_reject_ratio=1` is `--max-reject-ratio 1`."""
    folder = write_tokenizer(root / "tokenizer", tokenizer)
    values = [root / "mix.toml", "--model", model, "--root", root, "--out", out, "--tokenizer", folder]
    for name, value in options.items():
        values += [f"--{name.replace('_', '-')}", value]
    return [str(value) for value in values]


def exit_code_of(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run the `main` function of a command in this process. Return the exit code that its script would have."""
    with pytest.raises(SystemExit) as exited:
        run_cli(lambda: main(arguments))
    assert isinstance(exited.value.code, int)
    return exited.value.code


def build_in_process(root: Path, out: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    """Build a shard set in this process, without Ray. Return the folder of the set."""
    assert build_shards.main(arguments(root, out, tokenizer, workers=0, **options)) == 0
    return out


def dialogue_row(number: int) -> dict[str, object]:
    """Return a row with 1 to 3 questions and answers. One row in ten is text-only."""
    row: dict[str, object] = {"id": number, "image": f"{PHOTOGRAPHS[number % 6]}.jpg"}
    if number % 10 == 9:
        del row["image"]
    turns = [("human", f"What is on photograph {number}?"), ("gpt", "Something. " * (number % 13))] * (1 + number % 3)
    return row | {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def talk_row(number: int) -> dict[str, object]:
    return {key: value for key, value in dialogue_row(number).items() if key != "image"}


def write_talk(root: Path, num_rows: int) -> Path:
    """Write a data root with a single source of text-only dialogues. Return the root."""
    write_mix(root, [{"name": "talk", "format": "llava", "annotations": "rows.json"}])
    (root / "rows.json").write_text(json.dumps([talk_row(number) for number in range(num_rows)]))
    return root


def contents(out: Path) -> dict[str, str]:
    """Return the sha256 of every file of a shard set. Fail if work files of the build remain."""
    left = {path.name for path in ShardFolder(out).work.iterdir()}
    assert left == {"lock"}, f"work files remain: {left}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.is_file()}
