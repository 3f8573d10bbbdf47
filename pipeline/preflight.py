"""What would go wrong later is found now, and all of it at once, before the model is built.

Every rank checks what it can see, hears what the others found, and all go on or all stop.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from model.errors import UserError
from model.kernels import kernel_report
from pipeline.agreement import together
from pipeline.cost import CHECKPOINT_BYTES, STATE_BYTES, count_parameters
from pipeline.data import check_fit
from pipeline.engine import compose_config
from pipeline.pretrained import llm_source, tower_source
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from preprocess.shards import INDEX, Manifest, file_sha256

GIB = 1 << 30
ROOM_FOR = 2  # checkpoints, beside those that retention keeps: one being written, one to spare
HASHED_BYTES = 2 * GIB  # of shards; more would take longer than a preflight may
PROBE_BYTES = 64 << 20


def preflight(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Check everything; what is worth telling. Every rank must call it.

    Raises: UserError on all ranks, with all problems.
    """
    checks: list[Callable[[Recipe, Ranks], str]] = [check_ranks, check_kernels, check_memory, check_weights]
    if ranks.local_rank == 0:
        checks.append(check_shards)
    if ranks.is_main:
        checks += [check_batch, check_disk]
    return list(filter(None, together(ranks, *(functools.partial(check, recipe, ranks) for check in checks))))


def check_ranks(recipe: Recipe, ranks: Ranks) -> str:
    """Every rank hears every other, and how fast: an all-reduce of their numbers, then of a larger tensor."""
    total = torch.tensor([float(ranks.rank)], device=ranks.device)
    dist.all_reduce(total)
    expected = ranks.world_size * (ranks.world_size - 1) / 2
    if total.item() != expected:
        raise UserError(
            f"rank {ranks.rank}: the ranks add up to {total.item():.0f}, expected {expected:.0f}; look at the network"
        )
    if ranks.world_size == 1:
        return ""
    probe = torch.ones(PROBE_BYTES // 4, device=ranks.device)
    dist.all_reduce(probe)
    begun = time.monotonic()
    dist.all_reduce(probe)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    # A ring moves 2 (w - 1) / w times the tensor through every rank.
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * PROBE_BYTES
    return f"{ranks.world_size} ranks, all-reduce {moved / (time.monotonic() - begun) / 1e9:.1f} GB/s"


def check_kernels(recipe: Recipe, ranks: Ranks) -> str:
    return kernel_report(ranks.device)


def check_memory(recipe: Recipe, ranks: Ranks) -> str:
    """The rank's share of the training states must fit into what its GPU has free."""
    if ranks.device.type != "cuda":
        return ""
    parameters = count_parameters(recipe.config)
    needed = STATE_BYTES[recipe.engine.precision] * parameters.trainable / ranks.world_size + 2 * parameters.vision
    free, whole = torch.cuda.mem_get_info(ranks.device)
    if free < needed:
        raise UserError(
            f"rank {ranks.rank}: GPU has {free / GIB:.1f} of {whole / GIB:.1f} GiB free, the states alone need "
            f"{needed / GIB:.1f}; free the GPU or use more ranks"
        )
    return f"states {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free"


def check_batch(recipe: Recipe, ranks: Ranks) -> str:
    compose_config(recipe, ranks.world_size)
    return ""


def check_shards(recipe: Recipe, ranks: Ranks) -> str:
    """They fit the model, every file has its size, and as many as there is time for have their hash."""
    manifest = Manifest.load(recipe.data.shards)
    check_fit(manifest, recipe)
    index = Path(recipe.data.shards) / INDEX
    if not index.exists() or file_sha256(index) != manifest.index["sha256"]:
        raise UserError(f"{index}: is not the manifest's index; {_repair(recipe)}")
    hashed = 0
    for shard in manifest.shards:
        path = Path(recipe.data.shards) / shard.name
        size = path.stat().st_size if path.exists() else None
        if size != shard.bytes:
            raise UserError(f"{path}: has {size} bytes, the manifest says {shard.bytes}; {_repair(recipe)}")
        if hashed + shard.bytes <= HASHED_BYTES or not hashed:
            hashed += shard.bytes
            if file_sha256(path) != shard.sha256:
                raise UserError(f"{path}: its content is not what the manifest says; {_repair(recipe)}")
    share = hashed / max(1, sum(shard.bytes for shard in manifest.shards))
    return f"{len(manifest.shards)} shards of {manifest.counts['samples']} samples, {share:.0%} of them hashed"


def _repair(recipe: Recipe) -> str:
    return (
        f"find all damage with `python -m preprocess.shardset verify {recipe.data.shards}` and build the shards again"
    )


def check_weights(recipe: Recipe, ranks: Ranks) -> str:
    """Folders that are named must be there; what comes from the hub is looked for when it is read."""
    for key, source in (("weights.llm", llm_source(recipe)), ("weights.towers", tower_source(recipe))):
        if source and source.startswith(("/", ".")) and not Path(source).is_dir():
            raise UserError(f"{key}: {source}: no such folder; give a folder or a hub id, or `random`")
    return ""


def check_disk(recipe: Recipe, ranks: Ranks) -> str:
    """Room for what retention keeps and for the checkpoint that is being written."""
    each = CHECKPOINT_BYTES * count_parameters(recipe.config).trainable
    count = recipe.checkpoint.keep_last + ROOM_FOR
    there = len(list(Path(recipe.run.dir).glob("checkpoints/step-*")))
    needed = each * max(1, count - there)
    free = shutil.disk_usage(next(_existing(Path(recipe.run.dir).absolute()))).free
    if free < needed:
        raise UserError(
            f"run.dir: {recipe.run.dir}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} needed for {count} checkpoints "
            f"of {each / GIB:.1f}, {there} of which are there; make room or lower checkpoint.keep_last"
        )
    return f"checkpoints of {each / GIB:.2f} GiB, {free / GIB:.0f} GiB free"


def _existing(path: Path) -> Iterator[Path]:
    return (folder for folder in (path, *path.parents) if folder.is_dir())
