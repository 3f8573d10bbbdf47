"""Shard building benchmark: our builder, a plain script, Ray Data, and a lower bound for the time.

    python -m benchmarks.preprocess --json preprocess.json
    python -m benchmarks.preprocess --images 300 --rows-per-image 3        # as in the mix, where rows share images
    python -m benchmarks.preprocess --img2dataset other_venv/bin/python    # an environment that has img2dataset

Every program processes the same rows about the same photographs. The lower bound is the time of the parts that no
builder can avoid, such as decoding and writing. For one process the benchmark reports samples per CPU second, which
other work on the machine hardly changes. For several processes it reports samples per second of wall time, from the
time when each worker has written its first shard to the last shard. docs/performance.md has the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photographs import write_rows
from model.config import IGNORE_INDEX
from model.errors import run_cli
from model.presets import preset
from preprocess import build_shards
from preprocess.builder.build import build
from preprocess.builder.request import check_arguments
from preprocess.builder.sample_encoder import TEXTS_AT_ONCE
from preprocess.images import codec
from preprocess.images.codec import resize_to_square
from preprocess.prompts import encode_dialogue, load_tokenizer
from tests.support.golden_tokenizer import gpt_neox

MODEL = "emma_v2"
CONFIG = preset(MODEL)
PX = CONFIG.vision.image_px
RAY_DATA_NEEDS = "pandas"
ROUNDS = 3
PARTS = ("read", "decode", "resize", "encode", "tokenise", "hash", "write")

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

Rows = list[dict[str, Any]]


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


# -- Ours ------------------------------------------------------------------------------------------------------------


def command(root: Path, out: Path, workers: int, rows_per_shard: int) -> list[str]:
    words = [root / "mix.toml", "--model", MODEL, "--root", root, "--out", out, "--tokenizer", root / "tokenizer"]
    return [str(word) for word in [*words, "--workers", workers, "--samples-per-shard", rows_per_shard]]


def ours(root: Path, out: Path, rows_per_shard: int) -> float:
    """Return the CPU seconds of a whole build in this process, from reading the rows to the manifest."""
    request = check_arguments(build_shards.parse(command(root, out, 0, rows_per_shard)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return cpu_s(lambda: build(request))


def ours_on_ray(root: Path, out: Path, workers: int, rows_per_shard: int) -> float:
    """Return samples per second of a build on Ray, counted from each worker's first shard to the last of all shards."""
    words = [sys.executable, "-m", "preprocess.build_shards", *command(root, out, workers, rows_per_shard)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    ended = sorted(path.stat().st_mtime for path in out.glob("shard-*.json"))
    return (len(ended) - workers) * rows_per_shard / (ended[-1] - ended[workers - 1])


def ours_in_processes(root: Path, out: Path, processes: int, rows_per_shard: int) -> float:
    """Return the total samples per second of simultaneous builds without Ray, from each first shard to each last."""
    folders = [out / str(number) for number in range(processes)]
    words = [sys.executable, "-m", "preprocess.build_shards"]
    started = [
        subprocess.Popen([*words, *command(root, folder, 0, rows_per_shard)], stdout=subprocess.DEVNULL, env=ONE_THREAD)
        for folder in folders
    ]
    assert not any(process.wait() for process in started)
    ended = [sorted(path.stat().st_mtime for path in folder.glob("shard-*.json")) for folder in folders]
    return sum((len(times) - 1) * rows_per_shard / (times[-1] - times[0]) for times in ended)


# -- The others ------------------------------------------------------------------------------------------------------


def everyday_tokens(tokenizer: Any, conversations: Iterable[Mapping[str, str]]) -> tuple[list[int], list[int]]:
    """Tokenize turn by turn into ids and labels, as fine-tuning scripts do."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in conversations:
        human = turn["from"] == "human"
        text = turn["value"].replace("<image>", "").strip()
        new = tokenizer(f"In: {text}\nOut: " if human else f"{text}{tokenizer.eos_token}").input_ids
        ids += new
        labels += [IGNORE_INDEX] * len(new) if human else new
    return ids, labels


def everyday_sample(root: Path, tokenizer: Any, row: Mapping[str, Any]) -> dict[str, bytes | str]:
    image = Image.open(root / row["image"]).convert("RGB").resize((PX, PX), Image.Resampling.BICUBIC)
    buffer, tokens = io.BytesIO(), io.BytesIO()
    image.save(buffer, "JPEG", quality=codec.JPEG_QUALITY, subsampling=0)
    ids, labels = everyday_tokens(tokenizer, row["conversations"])
    np.save(tokens, np.array([ids, labels], np.int32))
    meta = json.dumps({"id": row["id"], "image": row["image"]}).encode()
    return {"__key__": f"{int(row['id']):09d}", "jpg": buffer.getvalue(), "tokens.npy": tokens.getvalue(), "json": meta}


def everyday_tokenizer(root: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = str(root / "tokenizer/tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|endoftext|>")


def everyday_script(root: Path, out: Path, rows_per_shard: int) -> float:
    """Return the CPU seconds of PIL, transformers and webdataset.ShardWriter, without loading the tokenizer."""
    import webdataset

    tokenizer = everyday_tokenizer(root)
    out.mkdir()

    def work() -> None:
        with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=rows_per_shard, verbose=0) as writer:
            for row in json.loads((root / "rows.json").read_text()):
                writer.write(everyday_sample(root, tokenizer, row))

    return cpu_s(work)


def ray_data(root: Path, out: Path, workers: int) -> float:
    """Return samples per second of Ray Data's `write_webdataset`, in its own process, without Ray's start-up."""
    words = [sys.executable, "-m", "benchmarks.preprocess", "--ray-data-only", str(root), str(out), str(workers)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


class EverydayMap:
    """Callable that a Ray Data worker applies to each row."""

    def __init__(self, root: Path):
        self.root, self.tokenizer = root, everyday_tokenizer(root)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        row = json.loads(row["row"])
        return everyday_sample(self.root, self.tokenizer, row)


def ray_data_only(root: Path, out: Path, workers: int) -> None:
    """Print the rate of the second pass; a first, small pass starts Ray's workers."""
    import ray

    ray.init(address="local", num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)
    rows = [{"row": json.dumps(row)} for row in json.loads((root / "rows.json").read_text())]
    for part, folder in ((rows[:64], out / "warm"), (rows, out / "all")):
        started = time.monotonic()
        dataset = ray.data.from_items(part, override_num_blocks=4 * workers)
        mapped = dataset.map(EverydayMap, fn_constructor_args=(root,), concurrency=workers)
        mapped.write_webdataset(str(folder), encoder=None)
        took = time.monotonic() - started
    print(len(rows) / took)


IMG2DATASET = """
import io, pathlib, sys, time
from img2dataset.resizer import Resizer
resizer = Resizer(int(sys.argv[2]), "center_crop", False, downscale_interpolation="cubic", encode_quality=95)
images = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
best = float("inf")
for _ in range(3):
    started = time.process_time()
    failed = [error for *_, error in map(resizer, map(io.BytesIO, images)) if error]
    best = min(best, time.process_time() - started)
    assert not failed, failed
print(len(images) / best)
"""


def img2dataset(python: Path, root: Path) -> float:
    """Return images per CPU second of img2dataset's resizer alone, which crops instead of squashing."""
    words = [str(python), "-c", IMG2DATASET, str(root / "images"), str(PX)]
    environment = ONE_THREAD | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


# -- The limit -------------------------------------------------------------------------------------------------------


def parts(root: Path, out: Path, rows: Rows) -> dict[str, float]:
    """Return the CPU seconds of each part of the work. Images are processed once per image, everything else per row."""
    tokenizer = load_tokenizer(root / "tokenizer")
    took = dict.fromkeys(PARTS, 0)

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time_ns()
        result = work(*arguments)
        took[name] += time.process_time_ns() - started
        return result

    image, encoded = "", b""
    with out.open("wb") as file:
        for number, row in enumerate(rows):
            if number % TEXTS_AT_ONCE == 0:
                for each in rows[number : number + TEXTS_AT_ONCE]:
                    turns = each["conversations"]
                    timed("tokenise", encode_dialogue, turns, CONFIG.template, tokenizer, CONFIG.max_text_tokens)
            if row["image"] != image:
                image = row["image"]
                pixels = timed("decode", codec.decode_rgb, timed("read", (root / image).read_bytes))
                encoded = timed("encode", codec.encode_jpeg, timed("resize", resize_to_square, pixels, PX))
            timed("hash", hashlib.sha256, encoded)
            timed("write", file.write, encoded)
    return {name: value / 1e9 for name, value in took.items()}


# -- The table -------------------------------------------------------------------------------------------------------


def levels_off(root: Path, limit: int = 200) -> dict[int, float]:
    """Return the share of pixel values that differ by 0, 1, 2, … levels from Pillow's resizing, before encoding."""
    off: Counter[int] = Counter()
    for path in sorted((root / "images").iterdir())[:limit]:
        data = path.read_bytes()
        exact = Image.open(io.BytesIO(data)).convert("RGB").resize((PX, PX), Image.Resampling.BICUBIC)
        ours = resize_to_square(codec.decode_rgb(data), PX)
        off.update(np.abs(ours.astype(np.int16) - np.asarray(exact)).ravel().tolist())
    return {levels: count / off.total() for levels, count in sorted(off.items())}


def measure(
    scratch: Path,
    images: int,
    rows_per_image: int,
    workers: list[int],
    rounds: int = ROUNDS,
    processes: Sequence[int] = (),
    img2dataset_python: Path | None = None,
) -> dict[str, Any]:
    root = scratch / "root"
    rows = write_rows(root, images, rows_per_image)
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_bytes(gpt_neox().data)
    shard = max(1, len(rows) // 16)  # enough shards for two workers to take turns
    ours(root, scratch / "warm", len(rows))
    cpu = {"ours": math.inf, "script": math.inf}
    took = dict.fromkeys(PARTS, math.inf)
    # Alternate the programs, so that other work on the machine affects all of them equally. The best time is reported.
    for turn in range(rounds):
        cpu["ours"] = min(cpu["ours"], ours(root, scratch / f"ours-{turn}", len(rows)))
        cpu["script"] = min(cpu["script"], everyday_script(root, scratch / f"script-{turn}", len(rows)))
        took = {name: min(took[name], value) for name, value in parts(root, scratch / "parts", rows).items()}
    limit = sum(took.values())
    results: dict[str, Any] = {
        "rows": len(rows),
        "images": images,
        "samples_per_cpu_s": {name: len(rows) / value for name, value in {**cpu, "limit": limit}.items()},
        "ms_per_sample": {name: 1000 * value / len(rows) for name, value in took.items()},
        "times_script": cpu["script"] / cpu["ours"],
        "of_limit": limit / cpu["ours"],
        "levels_off": levels_off(root),
        "samples_per_s_in_processes": {
            n: ours_in_processes(root, scratch / f"processes-{n}", n, shard) for n in processes
        },
        "samples_per_s_on_ray": {n: ours_on_ray(root, scratch / f"ray-{n}", n, shard) for n in workers},
    }
    if img2dataset_python:
        results["images_per_cpu_s_of_img2dataset"] = img2dataset(img2dataset_python, root)
    if workers and importlib.util.find_spec(RAY_DATA_NEEDS):
        rates = {n: ray_data(root, scratch / f"ray-data-{n}", n) for n in workers}
        results["samples_per_s_of_ray_data"] = rates
    return results


def table(results: Mapping[str, Any]) -> str:
    rates, ray = results["samples_per_cpu_s"], results["samples_per_s_on_ray"]
    lines = [
        f"{results['rows']} rows about {results['images']} photographs",
        "| | samples/s/core |",
        "|---|---|",
        f"| ours, in one process | {rates['ours']:.0f} |",
        *(
            f"| ours, {n} process{'es'[: 2 * (n > 1)]} at once (each) | {rate / int(n):.0f} |"
            for n, rate in results["samples_per_s_in_processes"].items()
        ),
        *(f"| ours, Ray, {n} worker{'s'[: n > 1]} (each) | {rate / int(n):.0f} |" for n, rate in ray.items()),
        f"| script: PIL, transformers, webdataset.ShardWriter | {rates['script']:.0f} |",
    ]
    for n, rate in results.get("samples_per_s_of_ray_data", {}).items():
        lines.append(f"| Ray Data `write_webdataset`, {n} worker{'s'[: n > 1]} (each) | {rate / int(n):.0f} |")
    if ray and "samples_per_s_of_ray_data" not in results:
        lines.append(f"| Ray Data `write_webdataset` | not measured: {RAY_DATA_NEEDS} is not installed |")
    if rate := results.get("images_per_cpu_s_of_img2dataset"):
        lines.append(f"| img2dataset's resizer alone, cropping | {rate:.0f} images |")
    lines.append(f"| limit: the sum of the parts | {rates['limit']:.0f} |")
    spent = ", ".join(f"{name} {value:.2f}" for name, value in results["ms_per_sample"].items())
    off = ", ".join(f"{share:.2g} by {levels}" for levels, share in results["levels_off"].items())
    lines += [
        f"\nms per sample: {spent}",
        f"{results['times_script']:.2f} × the script, {results['of_limit']:.0%} of the limit",
        f"share of values by their distance from Pillow's, in levels: {off}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="number of images (default %(default)s)")
    parser.add_argument("--rows-per-image", type=int, nargs="+", default=[1, 3], help="default: 1 3")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2], help="numbers of Ray workers to measure; none: without Ray"
    )
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[], help="numbers of simultaneous builds without Ray"
    )
    parser.add_argument(
        "--img2dataset", type=Path, metavar="PYTHON", help="interpreter of an environment with img2dataset"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--ray-data-only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ray_data_only:
        root, out, workers = args.ray_data_only
        ray_data_only(Path(root), Path(out), int(workers))
        return
    results = []
    for sharing in args.rows_per_image:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(Path(scratch), args.images, sharing, args.workers, img2dataset_python=args.img2dataset)
            results.append(found)
        print(table(results[-1]), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
