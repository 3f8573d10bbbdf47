"""Checkpoint benchmark: time to save and to load a full-size random state, compared with the speed of the disk.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint /scratch pipeline/recipes/emma_v2.toml --json checkpoint.json
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint /tmp/scratch pipeline/recipes/demo.toml          # on a CPU

To measure the speed of the disk, every rank writes its share of the bytes to one plain file and syncs it, before and
after the save; the faster of the two writes is reported. Then it reads the file again. The output needs twice the size
of the state. It goes to a new folder inside the given one, and is deleted afterwards. There is no data and therefore no
probe, so the stall does not include the forward pass of the probe, which a real save runs. docs/performance.md has the
result on two GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.emma import Emma
from model.errors import run_cli
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.layout import bytes_of
from pipeline.checkpoint.manifest import Identity
from pipeline.checkpoint.resumer import Resumer
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.collectives import broadcast_from_main
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import Engine, build_engine, init_distributed
from pipeline.recipe import Recipe, load_recipe
from preprocess.atomic import sync

SAVE_EVERY_S = 1800.0  # assumed interval between saves, to compute the share of time in which training is stalled
BLOCK_BYTES = 64 << 20


def timed(action: Callable[[], Any]) -> float:
    """Run an action on all ranks at once. Return the seconds until every rank has finished."""
    dist.barrier()
    begun = time.monotonic()
    action()
    dist.barrier()
    return time.monotonic() - begun


def random_engine(recipe: Recipe, ranks: Ranks) -> Engine:
    """Build an engine with random weights."""
    with torch.device(ranks.device):
        emma = Emma(recipe.config)
    return build_engine(emma, recipe, ranks)


def make_moments(context: CheckpointContext) -> None:
    """Set Adam's moments to random values, as if it had done a step."""
    for buffer in context.snapshot.buffers:
        moments = {kind: torch.randn_like(buffer.master) for kind in ("exp_avg", "exp_avg_sq")}
        state = context.engine.optimizer.optimizer.state
        state[buffer.master] = {"step": torch.tensor(1.0, device=buffer.master.device), **moments}


def write_plainly(path: Path, block: memoryview, size: int) -> None:
    """Write and sync `size` bytes, this rank's share of a checkpoint, to one file."""
    with path.open("wb") as file:
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: size - start])
        sync(file)


def read_plainly(path: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def fingerprint(context: CheckpointContext) -> list[float]:
    """Return the sum of each tensor of the state. Two states are considered equal if all sums are equal."""
    adam = context.engine.optimizer.optimizer.state
    tensors = [
        tensor
        for b in context.snapshot.buffers
        for tensor in (b.master, adam[b.master]["exp_avg"], adam[b.master]["exp_avg_sq"])
    ]
    return [float(tensor.detach().double().sum()) for tensor in tensors]


def erase(context: CheckpointContext) -> None:
    for buffer in context.snapshot.buffers:
        buffer.master.data.zero_()
    context.engine.optimizer.optimizer.state.clear()


def measure(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Measure all figures. Must be called on every rank."""
    folder = Path(recipe.run.dir)
    identity = Identity(recipe=recipe.identity(), fingerprint=recipe.fingerprint(), shards_sha256="", total_steps=1)
    context = CheckpointContext(recipe=recipe, ranks=ranks, identity=identity, engine=random_engine(recipe, ranks))
    saver = Saver(context)
    make_moments(context)
    before = fingerprint(context)
    size = context.snapshot.bytes
    results: dict[str, Any] = {"model": recipe.model, "ranks": ranks.world_size, "gb": size * ranks.world_size / 1e9}
    results["allocate_s"] = timed(lambda: context.snapshot.memory)
    plain, block = folder / f"plain-{ranks.rank}", bytes_of(torch.randn(BLOCK_BYTES // 4))
    before_s = timed(lambda: write_plainly(plain, block, size))
    results["stall_s"] = timed(lambda: saver.save(1))
    results["save_s"] = results["stall_s"] + timed(saver.finish)
    results["plain_s"] = min(before_s, timed(lambda: write_plainly(plain, block, size)))
    results["plain_read_s"] = timed(lambda: read_plainly(plain))
    saved = context.folder / "step-00000001"
    erase(context)
    results["load_s"] = timed(lambda: Resumer(context).verify_and_load(saved))
    results["equal"] = fingerprint(context) == before
    return results


def table(results: dict[str, Any]) -> str:
    size, same = results["gb"], "loaded values are equal" if results["equal"] else "LOADED VALUES DIFFER"
    rows = [
        ("plain file: write and sync", "plain_s", ""),
        ("save, from beginning to end", "save_s", f"{results['plain_s'] / results['save_s']:.0%} of the disk's rate"),
        ("training is stalled", "stall_s", f"{results['stall_s'] / SAVE_EVERY_S:.2%} at one save per 30 minutes"),
        ("allocating host memory, once", "allocate_s", f"{size / results['ranks']:.1f} GB per rank"),
        ("plain file: read", "plain_read_s", ""),
        (
            "verify and load, on resuming",
            "load_s",
            f"{results['plain_read_s'] / results['load_s']:.0%} of the disk's rate; {same}",
        ),
    ]
    lines = [f"{results['model']}, {results['ranks']} ranks, {size:.2f} GB", "| | s | GB/s | |", "|---|---|---|---|"]
    lines += [f"| {name} | {results[key]:.2f} | {size / results[key]:.2f} | {note} |" for name, key, note in rows]
    return "\n".join(lines)


@contextmanager
def scratch(ranks: Ranks, parent: Path) -> Iterator[Path]:
    """Create a folder that all ranks share, and delete it at the end."""
    folder = broadcast_from_main(ranks, lambda: parent / f"checkpoint-benchmark-{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        dist.barrier()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder on the disk to measure")
    parser.add_argument("recipe", nargs="?", default="pipeline/recipes/emma_v2.toml", help="default: emma_v2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks)
    with scratch(ranks, args.folder) as folder:
        results = measure(load_recipe(args.recipe, [*args.overrides, f"run.dir={folder}"], planning=True), ranks)
        if ranks.is_main:
            print(table(results), flush=True)
        if ranks.is_main and args.json:
            args.json.write_text(json.dumps(results, indent=2))
    dist.destroy_process_group()
    os._exit(0 if results["equal"] else 1)


if __name__ == "__main__":
    run_cli(main)
