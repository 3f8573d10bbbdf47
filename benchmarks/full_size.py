"""Full-size build benchmark: time and memory of building shards from the paper's number of rows, with tiny images.

    python -m benchmarks.full_size /tmp/full --json full_size.json         # needs 10 GB, deleted afterwards
    python -m benchmarks.full_size /tmp/full --rows 50000 --keep

The raw data is synthetic, in the file formats of the published datasets. Reports how long planning, building,
finalising and verifying take, and the peak memory of driver and workers. Because images and preset are tiny, the build
rate is not that of real images, which benchmarks.preprocess measures. docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.photographs import dialogue
from model.errors import run_cli
from preprocess.build_shards import PAPER_MIX
from preprocess.demo.mix import train_tokenizer
from preprocess.shards.folder import ShardFolder

MODEL = "tiny_v2"
ROWS = 1_230_800
SHARES = {"llava": 0.541, "lvis": 0.181, "filter_cap1": 0.1, "filter_cap_more1": 0.145, "chart_release_update": 0.033}
TEXT_ONLY = 0.061  # share of LLaVA's rows that have no image
ROWS_PER_IMAGE = 20
LLAVA_FOLDERS = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"]
SAMPLE_EVERY_S = 0.5


# -- The data --------------------------------------------------------------------------------------------------------


def generate(root: Path, rows: int) -> None:
    """Write annotation files and image folders in the layout of docs/data.md."""
    count = {name: round(rows * share) for name, share in SHARES.items()}
    images = max(len(LLAVA_FOLDERS), rows // ROWS_PER_IMAGE // 2)
    folders = [*LLAVA_FOLDERS, "lrv/lrv-vg", "lrv/lrv-chart"]
    per_folder = -(-images // len(folders))
    for number, folder in enumerate(folders):
        _write_images(root / folder, range(number * per_folder, (number + 1) * per_folder))
    rng = np.random.Generator(np.random.Philox(key=3))
    _write_array(root / "llava_v1_5_mix665k.json", _llava(rng, count["llava"], LLAVA_FOLDERS, per_folder))
    _write_array(root / "lvis_instruct4v_220k.json", _llava(rng, count["lvis"], LLAVA_FOLDERS[:1], per_folder, 0))
    for name in ("filter_cap1", "filter_cap_more1", "chart_release_update"):
        _write_array(root / "lrv" / f"{name}.json", _lrv(count[name], per_folder))
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokenizer((turn["value"] for i in range(2000) for turn in dialogue(i)), root / "tokenizer")


def _write_images(folder: Path, colours: range) -> None:
    """Write colour gradients: distinct files of about a kilobyte."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 127, 64, dtype=np.uint8)
    for i, colour in enumerate(colours):
        red, green, blue = ramp + colour % 128, ramp[:48, None] + colour // 128 % 128, np.uint8(colour // 16384 * 40)
        Image.fromarray(np.stack(np.broadcast_arrays(red, green, blue), -1)).save(folder / f"{i}.jpg", quality=95)


def _llava(
    rng: np.random.Generator, count: int, folders: list[str], images: int, text_only: float = TEXT_ONLY
) -> Iterator[dict[str, Any]]:
    """Yield rows whose images are in random order, as in the published file."""
    texts = [dialogue(i, turns=1 + i % 4, words=25) for i in range(512)]
    for i, (chance, place) in enumerate(zip(rng.random(count), rng.integers(0, 1 << 30, count), strict=True)):
        turns = texts[int(place) % len(texts)]
        if chance < text_only:
            text_only_turns = [turn | {"value": turn["value"].replace("<image>\n", "")} for turn in turns]
            yield {"id": f"{i}", "model": "", "conversations": text_only_turns}
        else:
            folder = folders[int(place) % len(folders)]
            yield {"id": f"{i}", "image": f"{folder}/{int(place) // 7 % images}.jpg", "conversations": turns}


def _lrv(count: int, images: int) -> Iterator[dict[str, Any]]:
    """Yield rows so that the rows about the same image are adjacent."""
    for i in range(count):
        question, answer = dialogue(i % 997, turns=1, words=20)
        yield {
            "image_id": str(i // ROWS_PER_IMAGE % images),
            "question": question["value"].removeprefix("<image>\n"),
            "answer": answer["value"],
            "task": "image captioning",
        }


def _write_array(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for i, row in enumerate(rows):
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]")


# -- One monitored build ----------------------------------------------------------------------------------------------


def build(root: Path, out: Path, workers: int) -> dict[str, float]:
    words = [PAPER_MIX, "--model", MODEL, "--root", root, "--out", out, "--tokenizer", root / "tokenizer"]
    command = [sys.executable, "preprocess/build_shards.py", *map(str, words), "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started, started_at = time.monotonic(), time.time()
    driver = subprocess.Popen(command, env=environment)
    peaks = {"driver": 0, "worker": 0}
    planned = float("nan")
    while driver.poll() is None:
        if planned != planned and ShardFolder(out).dialogues.exists():
            planned = time.monotonic() - started
        _record_memory(driver.pid, peaks)
        time.sleep(SAMPLE_EVERY_S)
    assert driver.returncode == 0, f"the build failed: {driver.returncode}"
    last_shard = max(path.stat().st_mtime for path in out.glob("shard-*.json"))
    whole_set = ShardFolder(out).manifest.stat().st_mtime
    return {
        "planning_s": planned,
        "building_s": last_shard - started_at - planned,
        "finalising_s": whole_set - last_shard,
        "driver_gib": peaks["driver"] / 2**30,
        "worker_gib": peaks["worker"] / 2**30,
        "set_gb": sum(path.stat().st_size for path in out.glob("shard-*.tar")) / 1e9,
    }


def _record_memory(driver: int, peaks: dict[str, int]) -> None:
    """Record the peak resident memory of the driver and of the largest worker process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(driver)
        peaks["driver"] = max(peaks["driver"], process.memory_info().rss)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith("ray::build_shard"):
                    peaks["worker"] = max(peaks["worker"], child.memory_info().rss)


def verify(out: Path) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "preprocess.shardset", "verify", str(out)], check=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for raw data and shards")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the mix (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not delete the data and the shard set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        generate(args.folder / "root", args.rows)
        results = {"rows": args.rows, "workers": args.workers}
        results |= build(args.folder / "root", args.folder / "set", args.workers)
        results["verifying_s"] = verify(args.folder / "set")
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    print("| " + " | ".join(results) + " |\n|" + "---|" * len(results))
    print(
        "| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in results.values()), "|"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
