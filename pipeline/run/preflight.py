"""Preflight checks, which run before the model is built and report all problems of all ranks at once.

Afterwards all ranks continue, or all stop. A check downloads nothing, and has a time limit if it could take long.

To add a check, write a function `Context -> str` below, and add it in `preflight` to the list for all ranks, for one
rank per node, or for the main rank.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist

from model.errors import UserError
from model.hashing import file_sha256
from model.kernels.dispatch import kernel_report
from model.vision import tower_file
from pipeline.checkpoint.folder import CHECKPOINTS, REFUSED, find_leftovers, list_steps
from pipeline.checkpoint.retention import count_kept_forever
from pipeline.data.compatibility import check_shards_match_model
from pipeline.data.plan import count_steps
from pipeline.data.workers import prefetched_bytes, prepare_sockets
from pipeline.distributed.collectives import run_checks
from pipeline.distributed.ranks import Ranks
from pipeline.engine import compose_config
from pipeline.errors import convert_oserrors
from pipeline.flops import CHECKPOINT_BYTES, GIB, STATE_BYTES, count_parameters
from pipeline.initial_model import llm_source, open_init, tower_source
from pipeline.prefetch import language_model
from pipeline.recipe import Recipe
from pipeline.run.out_of_memory import out_of_memory_error
from pipeline.run.watchdog import time_limit
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest

SPARE_CHECKPOINTS = 2  # in addition to those that retention keeps: one that is being written, and one in reserve
HASHING_S = 15.0  # time limit for hashing shards; shards that are not hashed by then are checked by size alone
CHUNK_BYTES = 8 << 20  # size of one read when hashing
PROBE_BYTES = 64 << 20  # size of the all-reduce that is timed
LIMIT_S = 120.0  # time limit for all checks together; if it is exceeded, a check probably hangs
SHARED_MEMORY = Path("/dev/shm")  # where DataLoader workers put their micro-batches
MAX_NAMED = 3  # number of damaged shards that a message names; the message only counts the rest


@dataclass(frozen=True, kw_only=True)
class Context:
    """The argument of every check."""

    recipe: Recipe
    ranks: Ranks

    @property
    def checkpoints(self) -> Path:
        return Path(self.recipe.run.dir) / CHECKPOINTS

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the training shards, read once for all checks. Raises: UserError if there is none."""
        with convert_oserrors(self.recipe.data.shards):
            return Manifest.load(self.recipe.data.shards)


# A check returns a line for the log, or an empty one. It raises UserError or RetryableError.
Check = Callable[[Context], str]


def preflight(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Run all checks. Return lines for the log. Must be called on every rank.

    Raises on all ranks: UserError with all problems of all ranks; RetryableError if all problems are transient.
    """
    checks: list[Check] = [check_communication, check_kernels, check_gpu_memory, check_worker_sockets]
    if ranks.local_rank == 0:  # one rank per node, because the results of these checks depend only on the node
        checks += [check_vision_towers, check_initial_model, check_shared_memory, check_shards, check_held_out_shards]
    if ranks.is_main:
        checks += [check_language_model, check_deepspeed_config, check_checkpoint_space]
    context = Context(recipe=recipe, ranks=ranks)
    with time_limit(LIMIT_S, "the preflight", ranks):
        return list(filter(None, run_checks(ranks, [partial(check, context) for check in checks])))


def check_communication(context: Context) -> str:
    """Check that every rank receives data from every other rank, and measure the speed of an all-reduce."""
    ranks = context.ranks
    total = torch.tensor([float(ranks.rank)], device=ranks.device)
    dist.all_reduce(total)
    expected = ranks.world_size * (ranks.world_size - 1) / 2
    if total.item() != expected:
        raise UserError(
            f"rank {ranks.rank}: an all-reduce returns a wrong sum (found {total.item():.0f}, expected {expected:.0f})."
            " Check the network between the nodes."
        )
    if ranks.world_size == 1:
        return ""
    probe = torch.ones(PROBE_BYTES // 4, device=ranks.device)
    dist.all_reduce(probe)
    began = time.monotonic()
    dist.all_reduce(probe)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    # A ring all-reduce moves 2 (w - 1) / w times the tensor through every rank.
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * PROBE_BYTES
    return f"{ranks.world_size} ranks, all-reduce {moved / (time.monotonic() - began) / 1e9:.1f} GB/s"


def check_kernels(context: Context) -> str:
    return kernel_report(context.ranks.device)


def check_gpu_memory(context: Context) -> str:
    """Check that this rank's share of weights, gradients and optimizer states fits into its GPU's free memory."""
    recipe, ranks = context.recipe, context.ranks
    if ranks.device.type != "cuda":
        return ""
    parameters = count_parameters(recipe.config)
    needed = STATE_BYTES[recipe.engine.precision] * parameters.trainable / ranks.world_size + 2 * parameters.vision
    free, total = torch.cuda.mem_get_info(ranks.device)
    if free < needed:
        problem = (
            f"rank {ranks.rank} on {socket.gethostname()}: GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"but weights, gradients and optimizer states alone need {needed / GIB:.1f} GiB"
        )
        raise out_of_memory_error(recipe, ranks, problem, "free the GPU or use more ranks")
    return f"states {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free"


def check_vision_towers(context: Context) -> str:
    """Check that the towers' weights are on this node, in their folder or in the hub's cache."""
    if source := tower_source(context.recipe):
        for tower in context.recipe.config.vision.towers:
            tower_file(tower, source, cached=True)
    return ""


def check_initial_model(context: Context) -> str:
    """Check that the exported model of `weights.init` fits the preset and has the tokenizer of the shards."""
    recipe = context.recipe
    if recipe.weights.init is None:
        return ""
    exported, used = open_init(recipe), context.manifest.tokenizer
    known = {exported.extra.get("tokenizer_sha256"), exported.tokenizer and file_sha256(exported.tokenizer)}
    if used["sha256"] not in known:
        raise UserError(
            f"data.shards: {recipe.data.shards}: built with another tokenizer ({used['name']}) than the model of "
            f"weights.init. Build the shards with the tokenizer of that model."
        )
    alignment = recipe.config.alignment is not None and exported.config.alignment is None
    return f"starts from {recipe.weights.init}" + ", which has no decoder: the decoder starts untrained" * alignment


def check_shared_memory(context: Context) -> str:
    """Check that the prefetched micro-batches fit into shared memory. DataLoader workers would die when it is full."""
    recipe, ranks = context.recipe, context.ranks
    needed = prefetched_bytes(recipe) * local_ranks(ranks)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if free < needed:
        problem = (
            f"{socket.gethostname()}: {SHARED_MEMORY} has {free / GIB:.2f} GiB free, "
            f"but data loading needs {needed / GIB:.2f} GiB"
        )
        remedy = "give the container more shared memory (docker --shm-size), or lower data.workers"
        raise out_of_memory_error(recipe, ranks, problem, remedy)
    return ""


def check_worker_sockets(context: Context) -> str:
    """Check that DataLoader workers can create the sockets that transfer their tensors to this rank."""
    if context.recipe.data.workers:
        prepare_sockets()
    return ""


def local_ranks(ranks: Ranks) -> int:
    """Return how many ranks the launcher started on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    return min(int(count), ranks.world_size)


def check_shards(context: Context) -> str:
    with convert_oserrors(context.recipe.data.shards):
        return inspect_shards(context.manifest, context.recipe)


def check_held_out_shards(context: Context) -> str:
    recipe = context.recipe
    if recipe.evaluate.shards is None:
        return ""
    held_out = replace(recipe, data=replace(recipe.data, shards=recipe.evaluate.shards))
    try:
        with convert_oserrors(held_out.data.shards):
            return f"held out: {inspect_shards(Manifest.load(held_out.data.shards), held_out)}"
    except UserError as error:
        raise UserError(str(error).replace("data.shards", "evaluate.shards", 1)) from None


def inspect_shards(manifest: Manifest, recipe: Recipe) -> str:
    """Check that the shards match the model, and verify their sizes and as many of their checksums as time allows."""
    folder = ShardFolder(Path(recipe.data.shards))
    check_shards_match_model(manifest, recipe)
    repair = f"list all damage with `python -m preprocess.shardset verify {folder}`, then build the shards again"
    if not folder.index.exists() or file_sha256(folder.index) != manifest.index["sha256"]:
        raise UserError(f"{folder.index}: its checksum does not match the manifest; {repair}")
    damaged = [
        f"{path} has {size} bytes, the manifest says {shard.bytes}"
        for shard in manifest.shards
        if (size := _size(path := folder.file(shard.name))) != shard.bytes
    ]
    if damaged:
        more = f", and {len(damaged) - MAX_NAMED} more" if len(damaged) > MAX_NAMED else ""
        raise UserError(f"{', '.join(damaged[:MAX_NAMED])}{more}; {repair}")
    hashed, until = 0, time.monotonic() + HASHING_S
    for shard in random.sample(manifest.shards, len(manifest.shards)):  # a different order on each node
        path = folder.file(shard.name)
        if (sha256 := sha256_within(path, until)) is None:
            break
        if sha256 != shard.sha256:
            raise UserError(f"{path}: its checksum does not match the manifest; {repair}")
        hashed += shard.bytes
    share = hashed / max(1, sum(shard.bytes for shard in manifest.shards))
    return f"{len(manifest.shards)} shards of {manifest.counts['samples']} samples, {share:.0%} of them hashed"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def sha256_within(path: Path, until: float) -> str | None:
    """Return a file's SHA-256, or None if it cannot be read before the time `until`."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while time.monotonic() < until:
            if not (chunk := file.read(CHUNK_BYTES)):
                return digest.hexdigest()
            digest.update(chunk)
    return None


def check_language_model(context: Context) -> str:
    """Check that the pretrained language model is in its folder or in the hub's cache, unless the run resumes."""
    source = llm_source(context.recipe)
    if source is None or list_steps(context.checkpoints):
        return ""
    return f"language model {source}: {language_model(context.recipe, source, cached=True)}"


def check_deepspeed_config(context: Context) -> str:
    """Check the DeepSpeed JSON, and that the global batch is a multiple of the micro-batch times the world size."""
    compose_config(context.recipe, context.ranks.world_size)
    return ""


def check_checkpoint_space(context: Context) -> str:
    """Check that the disk has space for the checkpoints that the run will keep and for the one being written.

    A refused checkpoint counts as existing, because the next save deletes it and reuses its space. Leftovers of
    interrupted saves count as free space, because resuming deletes them.
    """
    recipe = context.recipe
    folder = context.checkpoints
    each = CHECKPOINT_BYTES * count_parameters(recipe.config).trainable
    kept = count_kept_forever(recipe.checkpoint, _total_steps(recipe, context.manifest))
    count = recipe.checkpoint.keep_last + kept + SPARE_CHECKPOINTS
    there = len([*folder.glob("step-*"), *folder.glob(f"{REFUSED}*")])
    needed = each * max(1, count - there)
    run_dir = Path(recipe.run.dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())).free
    free += sum(file.stat().st_size for leftover in find_leftovers(folder) for file in leftover.iterdir())
    if free < needed:
        forever = f", of which {kept} are kept forever" if kept else ""
        remedy = "lower checkpoint.keep_last" + " or raise checkpoint.keep_every" * bool(kept)
        raise UserError(
            f"run.dir: {recipe.run.dir}: {free / GIB:.1f} GiB free, but {needed / GIB:.1f} GiB needed: the run needs "
            f"space for {count} checkpoints of {each / GIB:.1f} GiB{forever} ({there} already on disk); "
            f"free some space, or {remedy}"
        )
    return f"{count} checkpoints of {each / GIB:.2f} GiB ({there} already on disk); {free / GIB:.0f} GiB free"


def _total_steps(recipe: Recipe, manifest: Manifest) -> int:
    steps_per_epoch = count_steps(
        with_image=manifest.counts["with_image"],
        text_only=manifest.counts["text_only"],
        global_batch=recipe.optim.global_batch,
    )
    return recipe.steps or recipe.data.epochs * steps_per_epoch
