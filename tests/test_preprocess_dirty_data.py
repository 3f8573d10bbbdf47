"""Every kind of dirt, through one real build: rejected for the right reason, or a sample with the right content."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess import build_shards
from preprocess.prompts import Tokenizer
from preprocess.rejects import REASONS
from preprocess.shards.manifest import Manifest
from preprocess.shards.sample import Sample, from_fields, sample_pixels
from preprocess.shards.writer import read_fields
from preprocess.shardset import main as shardset
from tests.support.dirty_rows import ALL, Dirt, write_dirt
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, build_in_process, write_mix

JPEG_LEVELS = 14  # how far a flat colour may drift


class Built:
    """The set that was built of the dirt, by row."""

    def __init__(self, out: Path) -> None:
        self.out, self.manifest = out, Manifest.load(out)
        lines = (out / "rejects.jsonl").read_text().splitlines()
        self.rejects: dict[int, dict[str, Any]] = {entry["row"]: entry for entry in map(json.loads, lines)}
        self.samples: dict[int, Sample] = {sample.row: sample for sample in self._read()}

    def _read(self) -> Iterator[Sample]:
        for shard in self.manifest.shards:
            for key, fields in read_fields(self.out / shard.name):
                yield from_fields(fields, key)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("dirt") / "root"
    write_dirt(root)
    write_mix(root, [{"name": "dirt", "format": "llava", "annotations": "dirt.jsonl", "images": "pictures"}])
    return Built(build_in_process(root, root.parent / "out", tokenizer=gpt_neox(), max_reject_ratio=1.0))


@pytest.mark.parametrize("row", range(len(ALL)), ids=[dirt.kind for dirt in ALL])
def test_dirt_is_repaired_or_rejected_with_its_reason(built: Built, row: int) -> None:
    dirt = ALL[row]
    assert (row in built.rejects) != (row in built.samples), "exactly one of the two"
    if dirt.reason:
        assert built.rejects[row]["reason"] == dirt.reason, built.rejects[row]
        assert built.rejects[row]["detail"]
        return
    sample = built.samples[row]
    if dirt.text is not None:
        assert gpt_neox().decode(sample.tokens.tolist(), skip_special_tokens=False) == dirt.text
    assert (sample.image is None) == (dirt.no_picture or "image" not in _object(dirt))
    for (across, down), colour in dirt.colours.items():
        pixels = sample_pixels(sample)
        found = pixels[int(down * len(pixels)), int(across * len(pixels))]
        assert np.abs(found.astype(int) - colour).max() <= JPEG_LEVELS, (across, down, found)


def _object(dirt: Dirt) -> dict[str, Any]:
    return dirt.row if isinstance(dirt.row, dict) else {}


def test_the_counts_add_up(built: Built) -> None:
    counts = built.manifest.counts
    assert counts["rows"] == len(ALL) + 1 == counts["samples"] + counts["rejects"]
    assert counts["samples"] == len(built.samples) == sum(shard.samples for shard in built.manifest.shards)
    assert counts["rejects"] == len(built.rejects) == sum(built.manifest.rejects_by_reason.values())
    assert built.manifest.sources == {"dirt": {name: counts[name] for name in ("rows", "samples", "rejects")}}


def test_every_line_of_rejects_says_where_and_why(built: Built) -> None:
    for entry in built.rejects.values():
        assert list(entry) == ["source", "row", "id", "reason", "detail"]
        assert entry["source"] == "dirt"
        assert entry["id"]


def test_rejects_say_the_same_in_every_run(built: Built) -> None:
    """Decoders like to quote the address of an object in memory."""
    for entry in built.rejects.values():
        assert " 0x" not in entry["detail"]
        assert str(built.out.parent) not in entry["detail"] or entry["reason"] == "picture_path_escapes"


def test_broken_json_is_named_with_line_and_column(built: Built) -> None:
    row = next(i for i, dirt in enumerate(ALL) if dirt.kind == "broken JSON")
    assert built.rejects[row]["detail"].startswith(f"line {row + 1} column 41")


def test_the_special_text_of_a_message_never_ends_an_answer(built: Built) -> None:
    for sample in built.samples.values():
        ends = np.flatnonzero(sample.tokens == gpt_neox().eos_id) + 1
        assert set(ends.tolist()) <= {end for _, end in sample.spans}


def test_a_set_built_of_dirt_is_sound(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardset(["verify", str(built.out)]) == 0, capsys.readouterr().out


def test_dirt_that_stays_the_same_is_not_built_again(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(built.out.parent / "root", built.out, gpt_neox(), max_reject_ratio=1.0, workers=0)
    assert build_shards.main([*words, "--compare-pictures"]) == 0
    assert "is up to date" in capsys.readouterr().out


def test_every_reason_is_met_or_cannot_be_made_here() -> None:
    assert set(REASONS) - {dirt.reason for dirt in ALL} == {"picture_unreadable"}, "root may read everything"


def test_the_table_in_the_docs_has_every_kind_and_its_outcome() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data-cleaning.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:2] == "| "]
    documented = {cells[0]: cells[1] for cells in rows if cells[0] != "kind"}
    assert documented.keys() == {dirt.kind for dirt in ALL}
    for dirt in ALL:
        assert documented[dirt.kind].startswith(f"`{dirt.reason}`" if dirt.reason else "repaired"), dirt.kind


def test_the_tokenizer_of_the_set_is_the_one_that_was_used(built: Built) -> None:
    copy = Tokenizer((built.out / "tokenizer.json").read_bytes(), "copy")
    assert copy.sha256 == built.manifest.tokenizer["sha256"] == gpt_neox().sha256
