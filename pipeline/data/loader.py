"""Plan + shards -> micro-batches. Samples are read by their offsets in the index: random access, nothing skipped."""

from __future__ import annotations

import functools
import re
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from model.config import IGNORE_INDEX, PAD_ID
from model.errors import UserError
from pipeline.data.by_source import BySource, Sources
from pipeline.data.plan import FILLER, Ids, Plan, rank_slices
from pipeline.data.shard_reader import DamagedShardError, Pixels, ShardReader
from pipeline.distributed.processes import PROBLEM_STATES, process_state
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.stall_warning import StallWarning
from pipeline.errors import RetryableError
from pipeline.recipe import Recipe
from preprocess.prompts import load_tokenizer
from preprocess.shards.manifest import Manifest
from preprocess.shards.sample import Sample

PREFETCHED = 4  # micro-batches that each loading process keeps ready
HANGS_UP_S = 5.0  # at most, from a lost connection to the end of the process that it led to
LOADER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]+)")  # torch's RuntimeError
PINNING_DIED = "Pin memory thread exited unexpectedly"


@dataclass(frozen=True)
class MicroBatch:
    """What one rank sees in one forward pass. Rows whose `real` is False are filler and count for nothing."""

    tokens: torch.Tensor  # [b, t] int64, padded on the right
    targets: torch.Tensor  # [b, t] int64, IGNORE_INDEX where not supervised
    pixels: torch.Tensor | None  # [b, 3, h, w] uint8; in memory as decoded, colours last, until `to`
    real: torch.Tensor  # [b] bool
    slow: tuple[tuple[str, str, float], ...] = ()  # reads that took long: shard, key, seconds

    def to(self, device: torch.device) -> MicroBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True).contiguous())

    def pin_memory(self) -> MicroBatch:
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {n: change(v) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's micro-batches of an optimizer step, and facts about the whole step that the index knows."""

    step: int
    micro_batches: list[MicroBatch]
    ids: Ids  # rows of the index, of all ranks, without filler
    samples: int
    images: int
    supervised_tokens: int
    tokens: int  # visual and text, without padding
    padding_ratio: float  # of the positions computed, waiting for the slowest rank included
    wait_s: float  # how long the training loop waited for it
    sources: BySource
    slow: tuple[tuple[str, str, float], ...] = ()  # this rank's reads that took long: shard, key, seconds


def collate(rows: list[tuple[Sample, Pixels | None]], real: npt.NDArray[np.bool_]) -> MicroBatch:
    """Rows of one modality, padded on the right to the longest; those that are not `real` are not supervised."""
    shape = (len(rows), max(len(sample.tokens) for sample, _ in rows))
    tokens, targets = torch.full(shape, PAD_ID), torch.full(shape, IGNORE_INDEX)
    for i, (sample, _) in enumerate(rows):
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        tokens[i, : len(ids)] = ids
        for start, end in sample.spans if real[i] else ():
            targets[i, start:end] = ids[start:end]
    pictures = [pixels for _, pixels in rows if pixels is not None]
    assert len(pictures) in (0, len(rows)), "a global batch is of one modality"
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) if pictures else None
    return MicroBatch(tokens, targets, pixels, torch.from_numpy(real))


class MicroBatches(Dataset):
    """Item k is micro-batch k of one rank, counted over the whole training: any k can be asked for, in any process."""

    def __init__(self, reader: ShardReader, plan: Plan, ranks: Ranks, micro_batch: int):
        self.reader, self.plan, self.ranks, self.micro_batch = reader, plan, ranks, micro_batch
        self.per_step = plan.global_batch // (ranks.world_size * micro_batch)

    def __getitem__(self, k: int) -> MicroBatch | DamagedShardError | RetryableError:
        """An error is handed over, not raised: a loading process would bury it under its own traceback."""
        try:
            return self.load(k)
        except (DamagedShardError, RetryableError) as error:
            return error

    def load(self, k: int) -> MicroBatch:
        step, micro = divmod(k, self.per_step)
        ids = self.plan.step(step)
        mine = rank_slices(ids, self.ranks.rank, self.ranks.world_size, self.micro_batch)[micro]
        real = mine != FILLER
        batch = collate([self.reader.read(int(row)) for row in np.where(real, mine, ids[0])], real)
        slow, self.reader.slow = tuple(self.reader.slow), []
        return replace(batch, slow=slow)


class TrainData:
    """The global batches of a run, as one rank sees them.

    Raises: UserError if the shards do not fit the recipe's model.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.reader = ShardReader(recipe.data.shards)
        self.stall_warning = StallWarning()
        check_shards_match_model(self.reader.manifest, recipe)
        index = self.reader.index
        self.text_tokens = index.column("num_text_tokens").to_numpy()
        self.supervised = index.column("num_supervised_tokens").to_numpy()
        self.sources = Sources(index)
        self.plan = Plan(
            text_tokens=self.text_tokens,
            has_image=index.column("has_image").to_numpy(zero_copy_only=False),
            manifest_sha256=self.reader.manifest.sha256,
            seed=recipe.seed,
            global_batch=recipe.optim.global_batch,
            window=recipe.data.window,
        )
        self.dataset = MicroBatches(self.reader, self.plan, ranks, recipe.optim.micro_batch)
        self._expected: tuple[int, Any] | None = None  # a step, and the loader that begins there

    @property
    def total_steps(self) -> int:
        return self.recipe.steps or self.recipe.data.epochs * self.plan.steps_per_epoch

    def heaviest_micro_batch(self) -> MicroBatch:
        """This rank's largest micro-batch of the whole run: the plan has the longest samples come first."""
        parts = (self.dataset.load(k) for k in range(self.dataset.per_step))
        return max(parts, key=lambda part: part.tokens.numel())

    def start_workers(self, first: int) -> None:
        """Start the loading processes for `from_step(first)` already: they take seconds, in which others may work."""
        self._expected = (first, self._start(first))

    def from_step(self, first: int) -> Iterator[GlobalBatch]:
        """Global batches `first`, `first + 1`, … to the end of the run."""
        expected, loader = self._expected or (None, None)
        self._expected = None
        if expected != first:
            loader = self._start(first)
        what = functools.partial(_waiting, self.ranks.rank, weakref.ref(loader))
        try:
            for step in range(first, self.total_steps):
                asked = time.monotonic()
                with self.stall_warning.warn_if_slow(what):
                    micro_batches = [_unless_lost(self._next(loader)) for _ in range(self.dataset.per_step)]
                yield self._describe(step, micro_batches, time.monotonic() - asked)
        finally:
            del loader  # ends its processes, also when an error goes on its way up

    def _next(self, loader: Any) -> Any:
        """Raises: RetryableError if a loading process ends while it hands its tensors over."""
        try:
            return next(loader)
        except (OSError, EOFError) as error:
            processes = {process.sentinel: process.pid for process in loader._workers}
            ended = ", ".join(str(processes[sentinel]) for sentinel in wait(list(processes), timeout=HANGS_UP_S))
            raise _worker_lost(self.ranks, ended, f"ended ({error})") from error

    def _start(self, first: int) -> Any:
        """The loading processes, and Python's that looks after them. A SIGUSR1 to the whole job is for the rank."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # which children keep
        try:
            return iter(self._loader(first))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _loader(self, first: int) -> DataLoader:
        workers, per_step = self.recipe.data.workers, self.dataset.per_step
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=range(first * per_step, self.total_steps * per_step),
            num_workers=workers,
            pin_memory=self.ranks.device.type == "cuda",
            # A forked child of a process that runs threads (Gloo's, NCCL's) can hang; a fork server's outlives a kill.
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=PREFETCHED if workers else None,
            worker_init_fn=_outlive_sigterm,
        )

    def _describe(self, step: int, micro_batches: list[MicroBatch], wait_s: float) -> GlobalBatch:
        ids = self.plan.step(step)
        real = ids[ids != FILLER]
        has_image = bool(self.plan.has_image[ids[0]])
        visual = self.recipe.config.vision.num_patches if has_image else 0
        lengths = np.where(ids == FILLER, 0, self.text_tokens[ids] + visual)
        per_pass = self.recipe.optim.micro_batch * self.ranks.world_size
        computed = sum(int(part.max()) * len(part) for part in lengths.reshape(-1, per_pass))
        return GlobalBatch(
            step=step,
            micro_batches=micro_batches,
            ids=real,
            samples=len(real),
            images=len(real) if has_image else 0,
            supervised_tokens=int(self.supervised[real].sum()),
            tokens=int(lengths.sum()),
            padding_ratio=1 - int(lengths.sum()) / max(1, computed),
            wait_s=wait_s,
            slow=tuple(read for micro_batch in micro_batches for read in micro_batch.slow),
            sources=self.sources.divide(
                ids, rank_slices(ids, self.ranks.rank, self.ranks.world_size, self.recipe.optim.micro_batch)
            ),
        )


def _outlive_sigterm(worker: int) -> None:
    """SLURM's preemption signals loading processes too; the rank, which it asks to stop, still needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unless_lost(item: MicroBatch | DamagedShardError | RetryableError) -> MicroBatch:
    if isinstance(item, Exception):
        raise item
    return item


def _waiting(rank: int, loader: weakref.ref[Any]) -> str:
    """What a rank waits for: its loading processes, as a person would look for them."""
    named = []
    for process in getattr(loader(), "_workers", ()):
        state = PROBLEM_STATES.get(process_state(process.pid))
        named.append(f"{process.pid} ({state})" if state else str(process.pid))
    processes = f" from loading process {', '.join(named)}" if named else ""
    return f"rank {rank} on {socket.gethostname()}: waiting for data{processes}"


def worker_death(error: RuntimeError, ranks: Ranks) -> RetryableError | None:
    """What torch raises, wherever the training is, when a loading process ends; None for any other error."""
    if PINNING_DIED in str(error):  # torch's thread met it first
        return RetryableError(f"rank {ranks.rank} on {socket.gethostname()}: a loading process or its thread ended")
    told = LOADER_DIED.match(str(error))
    return _worker_lost(ranks, *told.groups()) if told else None


def _worker_lost(ranks: Ranks, pid: str, how: str) -> RetryableError:
    where = f"rank {ranks.rank} on {socket.gethostname()}"
    return RetryableError(f"{where}: loading process {pid} {how}; if memory ran out, lower data.workers")


def prefetched_bytes(recipe: Recipe) -> int:
    """Of one rank's micro-batches with pictures that its loading processes keep ready, in shared memory."""
    config = recipe.config
    sample = 3 * config.vision.image_px**2 + 2 * 8 * config.max_text_tokens
    return recipe.data.workers * PREFETCHED * recipe.optim.micro_batch * sample


def check_shards_match_model(manifest: Manifest, recipe: Recipe) -> None:
    """The shards must hold what the model reads: its picture size, its prompt format, ids within its embedding."""
    config = recipe.config
    facts = {
        "picture size": (manifest.image["px"], config.vision.image_px),
        "prompt template": (manifest.template, config.template),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise UserError(
                f"data.shards: {recipe.data.shards}: {what} is {found!r}, model {recipe.model!r} needs {expected!r}; "
                f"build shards with --model {recipe.model}"
            )
    _check_tokenizer(manifest, recipe)
    if manifest.tokenizer["vocab_size"] > config.llm.vocab_size:
        raise UserError(
            f"data.shards: {recipe.data.shards}: tokenizer {manifest.tokenizer['name']!r} has "
            f"{manifest.tokenizer['vocab_size']} entries, model {recipe.model!r} embeds {config.llm.vocab_size}; "
            f"build the shards with the model's own tokenizer"
        )


def _check_tokenizer(manifest: Manifest, recipe: Recipe) -> None:
    """By content if a copy is named, else by the name that the preset knows it by."""
    given, found = recipe.data.tokenizer, manifest.tokenizer
    expected = given or recipe.config.tokenizer
    if expected is None:
        return
    if (load_tokenizer(given).sha256 != found["sha256"]) if given else (expected != found["name"]):
        raise UserError(
            f"data.shards: {recipe.data.shards}: tokenised with {found['name']!r}, expected {expected!r}; build the "
            f"shards with --tokenizer {expected}, or name the copy that was used by data.tokenizer=FOLDER"
        )
