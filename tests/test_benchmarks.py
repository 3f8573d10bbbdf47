"""The benchmarks of the data stage do the work that they claim to time."""

import json
from pathlib import Path

from benchmarks.full_size import generate
from benchmarks.preprocess import measure, table
from preprocess import build_shards
from preprocess.build_shards import PAPER_MIX
from preprocess.shards import Manifest, read_fields


def test_the_builder_and_the_everyday_script_do_the_same_work(tmp_path: Path) -> None:
    results = measure(tmp_path, pictures=4, rows_per_picture=2, workers=[], rounds=1)
    assert results["rows"] == 8
    assert results["levels_off"][0] > 0.99
    assert max(results["levels_off"]) <= 2
    assert Manifest.load(tmp_path / "ours-0").counts["pictures"] == 4
    theirs = [fields["jpg"] for _, fields in read_fields(tmp_path / "script-0/00000.tar")]
    assert len(theirs) == 8
    assert "| ours, in one process |" in table(results)


def test_the_full_size_mix_is_laid_out_as_the_papers_mix_expects(tmp_path: Path) -> None:
    generate(tmp_path / "root", rows=400)
    words = [PAPER_MIX, "--model", "tiny_v2", "--root", tmp_path / "root", "--out", tmp_path / "set"]
    words += ["--tokenizer", tmp_path / "root/tokenizer", "--workers", 0]
    assert build_shards.main([str(word) for word in words]) == 0
    manifest = Manifest.load(tmp_path / "set")
    assert {name: about["rows"] for name, about in manifest.sources.items()} == {
        "llava": 216,
        "lvis": 72,
        "lrv": 40,
        "lrv_more": 58,
        "lrv_chart": 13,
    }
    assert manifest.counts["rejects"] == 0
    assert 0 < manifest.counts["text_only"] < 40
    rows = json.loads((tmp_path / "root/llava_v1_5_mix665k.json").read_text())
    shared = [row["image"] for row in rows if "image" in row]
    assert len(set(shared)) < len(shared)
