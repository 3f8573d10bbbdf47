"""A real build from every kind of damaged row: reject reasons, repaired samples, and counts."""

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
from tests.support.dirty_rows import DIRTY_ROWS, DirtyRow, write_dirty_rows
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, build_in_process, write_mix

JPEG_TOLERANCE = 14  # largest error of a uniform colour after JPEG encoding, on a scale of 255


class Built:
    """A shard set built from DIRTY_ROWS, with its samples and rejects by row number."""

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
    write_dirty_rows(root)
    write_mix(root, [{"name": "dirty", "format": "llava", "annotations": "rows.jsonl", "images": "images"}])
    return Built(build_in_process(root, root.parent / "out", tokenizer=gpt_neox(), max_reject_ratio=1.0))


@pytest.mark.parametrize("row", range(len(DIRTY_ROWS)), ids=[dirty.kind for dirty in DIRTY_ROWS])
def test_a_damaged_row_is_repaired_or_rejected_with_its_reason(built: Built, row: int) -> None:
    dirty = DIRTY_ROWS[row]
    assert (row in built.rejects) != (row in built.samples), "the row is neither a sample nor a reject, or it is both"
    if dirty.reason:
        assert built.rejects[row]["reason"] == dirty.reason, built.rejects[row]
        assert built.rejects[row]["detail"]
        return
    sample = built.samples[row]
    if dirty.text is not None:
        assert gpt_neox().decode(sample.tokens.tolist(), skip_special_tokens=False) == dirty.text
    assert (sample.image is None) == (dirty.text_only or "image" not in _object(dirty))
    for (x, y), colour in dirty.colours.items():
        pixels = sample_pixels(sample)
        found = pixels[int(y * len(pixels)), int(x * len(pixels))]
        assert np.abs(found.astype(int) - colour).max() <= JPEG_TOLERANCE, (x, y, found)


def _object(dirty: DirtyRow) -> dict[str, Any]:
    return dirty.row if isinstance(dirty.row, dict) else {}


def test_the_manifests_row_sample_and_reject_counts_add_up(built: Built) -> None:
    counts = built.manifest.counts
    assert counts["rows"] == len(DIRTY_ROWS) + 1 == counts["samples"] + counts["rejects"]
    assert counts["samples"] == len(built.samples) == sum(shard.samples for shard in built.manifest.shards)
    assert counts["rejects"] == len(built.rejects) == sum(built.manifest.rejects_by_reason.values())
    assert built.manifest.sources == {"dirty": {name: counts[name] for name in ("rows", "samples", "rejects")}}


def test_every_reject_names_its_source_row_id_and_reason(built: Built) -> None:
    for entry in built.rejects.values():
        assert list(entry) == ["source", "row", "id", "reason", "detail"]
        assert entry["source"] == "dirty"
        assert entry["id"]


def test_reject_details_contain_no_memory_addresses_and_no_output_paths(built: Built) -> None:
    """Details must be equal in every build, but messages of image decoders can contain memory addresses."""
    for entry in built.rejects.values():
        assert " 0x" not in entry["detail"]
        assert str(built.out.parent) not in entry["detail"] or entry["reason"] == "picture_path_escapes"


def test_the_reject_of_a_malformed_json_line_names_line_and_column(built: Built) -> None:
    row = next(i for i, dirty in enumerate(DIRTY_ROWS) if dirty.kind == "broken JSON")
    assert built.rejects[row]["detail"].startswith(f"line {row + 1} column 41")


def test_an_end_of_text_token_occurs_only_at_the_end_of_an_answer(built: Built) -> None:
    for sample in built.samples.values():
        ends = np.flatnonzero(sample.tokens == gpt_neox().eos_id) + 1
        assert set(ends.tolist()) <= {end for _, end in sample.spans}


def test_a_set_built_from_damaged_rows_passes_verification(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardset(["verify", str(built.out)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--compare-images", "--compare-pictures"])  # the second is the old name of the flag
def test_a_set_built_from_damaged_rows_is_not_rebuilt_if_nothing_changed(
    built: Built, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(built.out.parent / "root", built.out, gpt_neox(), max_reject_ratio=1.0, workers=0)
    assert build_shards.main([*words, flag]) == 0
    assert "is up to date" in capsys.readouterr().out


def test_every_reject_reason_except_unreadable_occurs_in_the_damaged_rows() -> None:
    assert set(REASONS) - {dirty.reason for dirty in DIRTY_ROWS} == {"picture_unreadable"}, (
        "root can read every file, so this cannot be tested here"
    )


def test_the_docs_list_every_kind_of_damaged_row_with_its_outcome() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data-cleaning.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:2] == "| "]
    documented = {cells[0]: cells[1] for cells in rows if cells[1].startswith(("`", "repaired"))}
    assert documented.keys() == {dirty.kind for dirty in DIRTY_ROWS}
    for dirty in DIRTY_ROWS:
        assert documented[dirty.kind].startswith(f"`{dirty.reason}`" if dirty.reason else "repaired"), dirty.kind


def test_a_shard_set_contains_the_tokenizer_that_built_it(built: Built) -> None:
    copy = Tokenizer((built.out / "tokenizer.json").read_bytes(), "copy")
    assert copy.sha256 == built.manifest.tokenizer["sha256"] == gpt_neox().sha256
