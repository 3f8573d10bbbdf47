"""What would go wrong later is found now, and all of it at once, before the model is built.

Every rank checks what it can see, hears what the others found, and all go on or all stop. Nothing is downloaded, and
what could take long has a limit.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from model.errors import UserError
from model.hashing import file_sha256
from model.kernels.dispatch import kernel_report
from model.vision import tower_file
from pipeline.checkpoint.folder import REFUSED, find_leftovers, list_steps
from pipeline.checkpoint.retention import count_kept_forever
from pipeline.data.loader import check_shards_match_model, prefetched_bytes
from pipeline.distributed.collectives import run_checks
from pipeline.distributed.ranks import Ranks
from pipeline.engine import compose_config
from pipeline.errors import convert_oserrors
from pipeline.flops import CHECKPOINT_BYTES, GIB, STATE_BYTES, count_parameters
from pipeline.initial_model import llm_source, tower_source
from pipeline.prefetch import language_model
from pipeline.recipe import Recipe
from pipeline.run.out_of_memory import out_of_memory_error
from pipeline.run.watchdog import EXIT_LOST
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest

ROOM_FOR = 2  # checkpoints, beside those that retention keeps: one being written, one to spare
HASHING_S = 15.0  # for a sample of the shards
CHUNK_BYTES = 8 << 20
PROBE_BYTES = 64 << 20
LIMIT_S = 120.0  # for the whole: checks are quick, so something hangs
SHARED_MEMORY = Path("/dev/shm")  # where loading processes put their micro-batches
NAMED = 3  # bad shards, in a line that counts them all


def preflight(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Check everything; what is worth telling. Every rank must call it.

    Raises: UserError on all ranks, with all problems; RetryableError if none of them is the user's.
    """
    checks: list[Callable[[Recipe, Ranks], str]] = [check_ranks, check_kernels, check_memory]
    if ranks.local_rank == 0:
        checks += [check_towers, check_shared_memory, check_shards, check_heldout]
    if ranks.is_main:
        checks += [check_language_model, check_batch, check_disk]
    with within(LIMIT_S, "the preflight", ranks):
        return list(filter(None, run_checks(ranks, [functools.partial(check, recipe, ranks) for check in checks])))


@contextmanager
def within(limit_s: float, what: str, ranks: Ranks) -> Iterator[None]:
    """End this process, to be tried again, if `what` hangs: a collective that a rank never enters waits for hours."""

    def give_up() -> None:
        where = f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}"
        print(f"error: {where}: {what} takes longer than {limit_s:g} s", file=sys.stderr, flush=True)
        print("look for a rank that did not start, and at the network between the nodes", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
        told = (
            f"rank {ranks.rank} on {socket.gethostname()}: GPU has {free / GIB:.1f} of {whole / GIB:.1f} GiB free, "
            f"the states alone need {needed / GIB:.1f}"
        )
        raise out_of_memory_error(recipe, ranks, told, "free the GPU or use more ranks")
    return f"states {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free"


def check_shared_memory(recipe: Recipe, ranks: Ranks) -> str:
    """Containers have little of it by default, and loading processes die when it is full."""
    needed = prefetched_bytes(recipe) * local_ranks(ranks)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if free < needed:
        told = (
            f"{socket.gethostname()}: {SHARED_MEMORY} has {free / GIB:.2f} GiB free, loading needs {needed / GIB:.2f}"
        )
        remedy = "give the container more (docker --shm-size), or lower data.workers"
        raise out_of_memory_error(recipe, ranks, told, remedy)
    return ""


def local_ranks(ranks: Ranks) -> int:
    """Ranks on this machine, as the launcher tells."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    return min(int(told), ranks.world_size)


def check_batch(recipe: Recipe, ranks: Ranks) -> str:
    compose_config(recipe, ranks.world_size)
    return ""


def check_shards(recipe: Recipe, ranks: Ranks) -> str:
    with convert_oserrors(recipe.data.shards):
        return inspect_shards(recipe)


def check_heldout(recipe: Recipe, ranks: Ranks) -> str:
    if recipe.evaluate.shards is None:
        return ""
    heldout = replace(recipe, data=replace(recipe.data, shards=recipe.evaluate.shards))
    try:
        with convert_oserrors(heldout.data.shards):
            return f"held out: {inspect_shards(heldout)}"
    except UserError as error:
        raise UserError(str(error).replace("data.shards", "evaluate.shards", 1)) from None


def inspect_shards(recipe: Recipe) -> str:
    """They fit the model, every file has its size, and as many as there is time for have their hash."""
    folder = ShardFolder(Path(recipe.data.shards))
    manifest = Manifest.load(folder)
    check_shards_match_model(manifest, recipe)
    repair = f"find all damage with `python -m preprocess.shardset verify {folder}` and build the shards again"
    if not folder.index.exists() or file_sha256(folder.index) != manifest.index["sha256"]:
        raise UserError(f"{folder.index}: is not the manifest's index; {repair}")
    wrong = [
        f"{path} has {size} bytes, the manifest says {shard.bytes}"
        for shard in manifest.shards
        if (size := _size(path := folder.file(shard.name))) != shard.bytes
    ]
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{', '.join(wrong[:NAMED])}{more}; {repair}")
    hashed, until = 0, time.monotonic() + HASHING_S
    for shard in random.sample(manifest.shards, len(manifest.shards)):  # others on each node, and at each start
        path = folder.file(shard.name)
        if (found := hash_until(path, until)) is None:
            break
        if found != shard.sha256:
            raise UserError(f"{path}: its content is not what the manifest says; {repair}")
        hashed += shard.bytes
    share = hashed / max(1, sum(shard.bytes for shard in manifest.shards))
    return f"{len(manifest.shards)} shards of {manifest.counts['samples']} samples, {share:.0%} of them hashed"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def hash_until(path: Path, until: float) -> str | None:
    """A file's SHA-256; None if the time is over before it is read, however slow the disk is."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while time.monotonic() < until:
            if not (chunk := file.read(CHUNK_BYTES)):
                return digest.hexdigest()
            digest.update(chunk)
    return None


def check_language_model(recipe: Recipe, ranks: Ranks) -> str:
    """In its folder or in the hub's cache; only the main rank reads it, and only if there is no checkpoint."""
    source = llm_source(recipe)
    if source is None or list_steps(Path(recipe.run.dir) / "checkpoints"):
        return ""
    return f"language model {source}: {language_model(recipe, source, cached=True)}"


def check_towers(recipe: Recipe, ranks: Ranks) -> str:
    """In their folder or in the hub's cache, on every node."""
    if source := tower_source(recipe):
        for tower in recipe.config.vision.towers:
            tower_file(tower, source, cached=True)
    return ""


def check_disk(recipe: Recipe, ranks: Ranks) -> str:
    """Room for what retention keeps and for the checkpoint that is being written.

    Refused checkpoints count as there, since the next save deletes them; what the start will remove counts as free.
    """
    folder = Path(recipe.run.dir) / "checkpoints"
    each = CHECKPOINT_BYTES * count_parameters(recipe.config).trainable
    kept = count_kept_forever(recipe.checkpoint, _total_steps(recipe))
    count = recipe.checkpoint.keep_last + kept + ROOM_FOR
    there = len([*folder.glob("step-*"), *folder.glob(f"{REFUSED}*")])
    needed = each * max(1, count - there)
    free = shutil.disk_usage(next(_existing(Path(recipe.run.dir).absolute()))).free
    free += sum(file.stat().st_size for leftover in find_leftovers(folder) for file in leftover.iterdir())
    if free < needed:
        keeping = f", {kept} of them kept for ever" if kept else ""
        remedy = "lower checkpoint.keep_last" + " or raise checkpoint.keep_every" * bool(kept)
        raise UserError(
            f"run.dir: {recipe.run.dir}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} needed for {count} checkpoints "
            f"of {each / GIB:.1f}{keeping}, {there} of which are there; make room or {remedy}"
        )
    return f"{count} checkpoints of {each / GIB:.2f} GiB, {there} of them there; {free / GIB:.0f} GiB free"


def _total_steps(recipe: Recipe) -> int:
    """As the plan will have it: every global batch is of one modality."""
    counts = Manifest.load(recipe.data.shards).counts
    modalities = (counts["text_only"], counts["samples"] - counts["text_only"])
    return recipe.steps or recipe.data.epochs * sum(-(-each // recipe.optim.global_batch) for each in modalities)


def _existing(path: Path) -> Iterator[Path]:
    return (folder for folder in (path, *path.parents) if folder.is_dir())
