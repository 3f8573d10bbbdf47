"""Benchmarks of preprocessing, padding and data loading: they perform the work that they time."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader, padding
from benchmarks.full_size import generate
from benchmarks.padding import PATCHES, llava_like, waste
from benchmarks.preprocess import measure, table
from pipeline.data.plan import FILLER
from preprocess import build_shards
from preprocess.build_shards import PAPER_MIX
from preprocess.shards.manifest import Manifest
from preprocess.shards.writer import read_fields


def test_the_builder_and_the_baseline_script_write_nearly_equal_images(tmp_path: Path) -> None:
    results = measure(tmp_path, images=4, rows_per_image=2, workers=[], rounds=1, processes=[2])
    assert results["rows"] == 8
    assert results["levels_off"][0] > 0.99
    assert max(results["levels_off"]) <= 2
    assert Manifest.load(tmp_path / "ours-0").counts["pictures"] == 4
    theirs = [fields["jpg"] for _, fields in read_fields(tmp_path / "script-0/00000.tar")]
    assert len(theirs) == 8
    assert "| ours, in one process |" in table(results)
    assert "| ours, 2 processes at once (each) |" in table(results)


def test_the_paper_mix_builds_from_generated_full_size_data_without_rejects(tmp_path: Path) -> None:
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


def test_waste_counts_padding_with_and_without_waiting_for_the_slowest_rank() -> None:
    tokens = np.array([10, 20, 30, 40], np.int32)
    has_image = np.zeros(4, bool)
    batches = np.full((1, 8, 1, 16), FILLER)
    batches[0, 0, 0, :2], batches[0, 1, 0, :2] = [0, 1], [2, 3]
    within, lockstep = waste(batches, tokens, has_image)
    assert within == pytest.approx(1 - 100 / (16 * 20 + 16 * 40))
    assert lockstep == pytest.approx(1 - 100 / (8 * 16 * 40))
    _, with_images = waste(batches, tokens, ~has_image)
    assert with_images == pytest.approx(1 - (100 + 4 * PATCHES) / (8 * 16 * (40 + PATCHES)))


def test_waste_is_lowest_with_sorting_windows_and_falls_as_they_widen() -> None:
    tokens, has_image = llava_like(share=0.05)
    found = [about["with_the_wait"] for about in padding.measure(tokens, has_image, windows=(8, 50, 100)).values()]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.5
    assert found[-1] < 0.05


def test_the_loader_benchmark_reports_speeds_for_our_loader_and_for_webdataset(tmp_path: Path) -> None:
    shards = loader.build_set(tmp_path, images=64)
    ours, stock = loader.ours(shards, epochs=2), loader.stock(shards, epochs=2)
    for found in (ours, stock):
        assert set(found) == {"samples_per_s", "first_batch_s"}
        assert min(found.values()) > 0
    assert "| ours |" in loader.table({"samples": 192, "ours": ours, "webdataset": stock})
