"""Data loading benchmark: samples per second from tars to batches, and seconds to the first batch of a resumed run.

    python -m benchmarks.loader --json loader.json

Compares `pipeline.data.loader` with the stock webdataset pipeline, each with two DataLoader workers. The stock
pipeline is a stream: to resume inside an epoch, it reads and discards the samples that the run has already seen in that
epoch. It need not read earlier epochs, because each epoch begins with another seed. The figure for the full-size mix
assumes that the stream keeps its rate. docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.photographs import write_rows
from benchmarks.preprocess import MODEL, command
from model.errors import run_cli
from pipeline.config import DataConfig, OptimConfig, RunConfig
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.recipe import Recipe
from preprocess import build_shards
from preprocess.shards.sample import from_fields, sample_pixels
from preprocess.strict_toml import UNSET
from tests.support.golden_tokenizer import gpt_neox

NEEDED_SAMPLES_PER_S = 80  # consumed by eight A100s at half of their peak FLOP/s
FULL_EPOCH = 1_230_000
WORKERS, MICRO_BATCH, GLOBAL_BATCH = 2, 16, 128
SHARDS = 8


def build_set(scratch: Path, images: int) -> Path:
    """Build a shard set with three rows per image."""
    root, out = scratch / "root", scratch / "shards"
    write_rows(root, images, rows_per_image=3)
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_bytes(gpt_neox().data)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert build_shards.main(command(root, out, workers=0, rows_per_shard=3 * images // SHARDS)) == 0
    return out


# -- Ours ------------------------------------------------------------------------------------------------------------


def ours(shards: Path, epochs: int) -> dict[str, float]:
    """Measure our loader for a single rank on a CPU, up to the batch that a GPU would receive."""
    recipe = Recipe(
        model=MODEL,
        data=DataConfig(shards=str(shards), tokenizer=str(shards / "tokenizer.json"), epochs=epochs, workers=WORKERS),
        optim=OptimConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH),
        run=RunConfig(dir=UNSET),
    )
    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    data = TrainData(recipe, ranks)
    rate = samples_per_s(batch.samples for batch in data.from_step(0))
    started = time.monotonic()
    data = TrainData(recipe, ranks)
    batches = data.from_step(data.plan.steps_per_epoch + data.plan.steps_per_epoch // 2)
    next(batches)
    first_s = time.monotonic() - started
    batches.close()  # type: ignore[attr-defined]
    return {"samples_per_s": rate, "first_batch_s": first_s}


def samples_per_s(counts: Iterator[int]) -> float:
    """Return the rate after the first batch, so that starting the processes is not counted."""
    next(counts)
    started, total = time.monotonic(), 0
    for count in counts:
        total += count
    return total / (time.monotonic() - started)


# -- The stock pipeline ----------------------------------------------------------------------------------------------


def decoded(fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    sample = from_fields(fields, fields["__key__"])
    return sample.tokens, sample_pixels(sample)


def padded(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = [torch.from_numpy(tokens.astype(np.int64)) for tokens, _ in rows]
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in rows]))
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), pixels


def stock_stream(shards: Path) -> DataLoader:
    import webdataset

    urls = sorted(map(str, shards.glob("*.tar")))
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000, seed=0).map(decoded)
    return DataLoader(stream.batched(MICRO_BATCH, collation_fn=padded), batch_size=None, num_workers=WORKERS)


def stock(shards: Path, epochs: int) -> dict[str, float]:
    """Measure the stock webdataset pipeline."""
    counts = (len(tokens) for _ in range(epochs) for tokens, _ in stock_stream(shards))
    rate = samples_per_s(counts)
    seen = sum(1 for _ in stock_stream(shards)) // 2
    started = time.monotonic()
    next(itertools.islice(iter(stock_stream(shards)), seen, None))
    return {"samples_per_s": rate, "first_batch_s": time.monotonic() - started}


# -- The table -------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    of_epoch = FULL_EPOCH / 2
    lines = [
        f"{results['samples']} samples, {WORKERS} DataLoader workers",
        f"| | samples/s | × the {NEEDED_SAMPLES_PER_S} of 8 GPUs | resumed in epoch 2: first batch, s | of 1.23 M, s |",
        "|---|---|---|---|---|",
    ]
    for name in ("ours", "webdataset"):
        rate, first = results[name]["samples_per_s"], results[name]["first_batch_s"]
        full = f"about {of_epoch / rate:.0f}" if name == "webdataset" else "as here, and the plan"
        lines.append(f"| {name} | {rate:.0f} | {rate / NEEDED_SAMPLES_PER_S:.1f} | {first:.1f} | {full} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=1000, help="number of images, with three rows each (default %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs to read (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shards = build_set(Path(scratch), args.images)
        results = {"samples": 3 * args.images, "ours": ours(shards, args.epochs)}
        results["webdataset"] = stock(shards, args.epochs)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
