"""The task that builds one shard: memory use, the image cache, and the check of its input."""

import dataclasses
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess.atomic import publish
from preprocess.build_shards import parse
from preprocess.builder.plan import plan_tasks, write_worklist
from preprocess.builder.request import check_arguments
from preprocess.builder.sample_encoder import SampleEncoder
from preprocess.builder.task import ShardTask, build_shard
from preprocess.images import cache, codec
from preprocess.images.cache import ENTRY_BYTES, ImageCache
from preprocess.images.store import ImageStore
from preprocess.rejects import Rejected
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, dialogue_row, write_mix

BOUND = 8 << 20


def one_task(root: Path, rows: list[dict[str, Any]]) -> ShardTask:
    """Return the task that builds the only shard of these rows, with original images."""
    (root / "rows.json").write_text(json.dumps(rows))
    head = '[images]\nencoding = "original"'
    write_mix(root, [{"name": "a", "format": "llava", "annotations": "rows.json"}], head)
    request = check_arguments(parse(arguments(root, root / "out", gpt_neox())))
    request.folder.work.mkdir(parents=True)
    publish(request.folder.tokenizer, request.tokenizer.data)
    return plan_tasks(request, write_worklist(request))[0]


def test_building_a_shard_leaves_no_reference_cycles_in_memory(tmp_path: Path) -> None:
    """Objects in reference cycles would stay in memory until a full garbage collection, possibly hours later."""
    Image.new("RGB", (64, 48)).save(tmp_path / "good.bmp")
    (tmp_path / "bad.bmp").write_bytes(b"BM")
    rows = [dialogue_row(1) | {"image": name} for name in ("good.bmp", "bad.bmp", "good.bmp", "bad.bmp", "none.bmp")]
    shard = one_task(tmp_path, rows)
    gc.collect()
    gc.disable()
    try:
        done = build_shard(shard)
        left = [one for one in gc.get_objects() if type(one) in (SampleEncoder, ImageStore, ImageCache)]
    finally:
        gc.enable()
    assert (done.samples, done.rejects) == (2, {"a": 3})
    assert left == []


def test_memory_for_building_a_shard_of_large_images_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CACHE_BYTES", BOUND)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    for number in range(40):
        Image.fromarray(noise + np.uint8(number)).save(tmp_path / f"{number}.bmp")
    shard = one_task(tmp_path, [dialogue_row(1) | {"image": f"{number}.bmp"} for number in range(40)])
    # Load the tokenizer and the templates before memory is measured.
    build_shard(dataclasses.replace(shard, name="warm"))
    tracemalloc.start()
    try:
        build_shard(shard)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 3_000_000 < peak < 6 * BOUND  # all images together have 120 MB


def test_an_image_shared_by_several_rows_is_decoded_once_even_if_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "good.bmp")
    (tmp_path / "bad.bmp").write_bytes(b"BM")
    decoded = []
    decode = codec.decode_rgb

    def counted(data: bytes, **limits: Any) -> np.ndarray:
        decoded.append(len(data))
        return decode(data, **limits)

    monkeypatch.setattr(codec, "decode_rgb", counted)
    rows = [dialogue_row(1) | {"image": name} for name in ("good.bmp", "bad.bmp") * 3]
    shard = one_task(tmp_path, rows)
    assert build_shard(shard).rejects == {"a": 3}
    assert len(decoded) == 2
    details = {entry["detail"] for entry in json.loads(shard.sidecar.read_bytes())["rejects"]}
    assert len(details) == 1


def test_the_image_cache_evicts_the_least_recently_used_entries_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_BYTES", 3 * (ENTRY_BYTES + 10))
    images = ImageCache()
    for name in ("a", "b", "c"):
        images.add(name, (name.encode() * 10, "jpg"))
    assert images.get("a") == (b"a" * 10, "jpg")
    images.add_rejection("d", "picture_empty", "d")
    assert images.get("b") is None
    with pytest.raises(Rejected, match="picture_empty: d"):
        images.get("d")
    images.add("large", (bytes(cache.CACHE_BYTES), "jpg"))
    assert images.get("large")
    assert [images.get(name) for name in "acd"] == [None] * 3


def test_a_task_that_reads_an_outdated_dialogue_file_raises_oserror(tmp_path: Path) -> None:
    """Ray retries a task after an OSError; by then, a slow network file system may show the current file."""
    shard = one_task(tmp_path, [{"id": 1, "conversations": dialogue_row(9)["conversations"]}])
    data = shard.folder.dialogues.read_bytes()
    shard.folder.dialogues.write_bytes(data.replace(b"What", b"That"))
    with pytest.raises(OSError, match="differ from the bytes that were written"):
        build_shard(shard)
    assert not shard.tar.exists()
    shard.folder.dialogues.write_bytes(data)
    assert build_shard(shard).samples == 1
