"""Plan + shards -> micro-batches. Samples are read by their offsets in the index: random access, nothing skipped."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from model.errors import UserError
from pipeline.plan import FILLER, Ids, Plan, rank_slices
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.sources import BySource, Sources
from preprocess.prompts import load_tokenizer
from preprocess.records import Sample, decode_pixels, from_payloads
from preprocess.rejects import Rejected
from preprocess.shards import Manifest, load_index

IGNORED = -100  # the target of a position that is not supervised
PAD_ID = 1
Pixels = npt.NDArray[np.uint8]
PARTS = ("tokens", "meta", "image")  # of a sample, as the index names them


class DamagedShardError(UserError):
    """One rank met it, the others did not."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank sees in one forward pass. Rows whose `real` is False are filler and count for nothing."""

    tokens: torch.Tensor  # [b, t] int64, padded on the right
    targets: torch.Tensor  # [b, t] int64, IGNORED where not supervised
    pixels: torch.Tensor | None  # [b, 3, h, w] uint8
    real: torch.Tensor  # [b] bool

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> MicroBatch:
        return replace(self, **{n: v.pin_memory() for n, v in vars(self).items() if isinstance(v, torch.Tensor)})


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


class ShardReader:
    """Samples by their row in the index. Opens each tar once per process; safe to send to another process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    @functools.cached_property
    def index(self) -> Any:
        return load_index(self.folder)

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        names = ["shard", *(f"{part}_{what}" for part in PARTS for what in ("offset", "bytes"))]
        return {name: self.index.column(name).to_numpy() for name in names}

    def read(self, row: int) -> tuple[Sample, Pixels | None]:
        """A sample and its picture [h, w, 3]. Raises: DamagedShardError naming shard, key and the remedy."""
        column = {name: int(values[row]) for name, values in self.columns.items()}
        shard = self.folder / self.manifest.shards[column["shard"]].name
        try:
            tokens, meta, image = (_payload(shard, column[f"{part}_offset"], column[f"{part}_bytes"]) for part in PARTS)
            sample = from_payloads(self._key(row), tokens, meta, image or None)
            return sample, decode_pixels(sample, self.manifest.image["px"]) if image else None
        except (OSError, EOFError, ValueError, KeyError, TypeError, Rejected) as error:
            raise self.damaged(row, shard, error) from error

    def _key(self, row: int) -> str:
        return str(self.index.column("key")[row])

    def damaged(self, row: int, shard: Path, error: Exception) -> DamagedShardError:
        return DamagedShardError(
            f"{shard}: sample {self._key(row)} cannot be read ({error}); find the damage with "
            f"`python -m preprocess.shardset verify {self.folder}`, delete what it names and build the shards again"
        )


def _payload(shard: Path, offset: int, size: int) -> bytes:
    data = os.pread(_open_shard(shard), size, offset)
    if len(data) != size:
        raise EOFError(f"it has {len(data)} of {size} bytes at {offset}")
    return data


@functools.cache
def _open_shard(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def collate(rows: list[tuple[Sample, Pixels | None]], real: npt.NDArray[np.bool_]) -> MicroBatch:
    """Rows of one modality, padded on the right to the longest; those that are not `real` are not supervised."""
    shape = (len(rows), max(len(sample.tokens) for sample, _ in rows))
    tokens, targets = torch.full(shape, PAD_ID), torch.full(shape, IGNORED)
    for i, (sample, _) in enumerate(rows):
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        tokens[i, : len(ids)] = ids
        for start, end in sample.spans if real[i] else ():
            targets[i, start:end] = ids[start:end]
    pictures = [pixels for _, pixels in rows if pixels is not None]
    assert len(pictures) in (0, len(rows)), "a global batch is of one modality"
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() if pictures else None
    return MicroBatch(tokens, targets, pixels, torch.from_numpy(real))


class MicroBatches(Dataset):
    """Item k is micro-batch k of one rank, counted over the whole training: any k can be asked for, in any process."""

    def __init__(self, reader: ShardReader, plan: Plan, ranks: Ranks, micro_batch: int):
        self.reader, self.plan, self.ranks, self.micro_batch = reader, plan, ranks, micro_batch
        self.per_step = plan.global_batch // (ranks.world_size * micro_batch)

    def __getitem__(self, k: int) -> MicroBatch | DamagedShardError:
        """An error is handed over, not raised: a loading process would bury it under its own traceback."""
        try:
            return self.load(k)
        except DamagedShardError as error:
            return error

    def load(self, k: int) -> MicroBatch:
        step, micro = divmod(k, self.per_step)
        ids = self.plan.step(step)
        mine = rank_slices(ids, self.ranks.rank, self.ranks.world_size, self.micro_batch)[micro]
        real = mine != FILLER
        return collate([self.reader.read(int(row)) for row in np.where(real, mine, ids[0])], real)


class TrainData:
    """The global batches of a run, as one rank sees them.

    Raises: UserError if the shards do not fit the recipe's model.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.reader = ShardReader(recipe.data.shards)
        check_fit(self.reader.manifest, recipe)
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

    @property
    def total_steps(self) -> int:
        return self.recipe.steps or self.recipe.data.epochs * self.plan.steps_per_epoch

    def heaviest(self) -> MicroBatch:
        """This rank's largest micro-batch of the whole run: the plan has the longest samples come first."""
        dataset = MicroBatches(self.reader, self.plan, self.ranks, self.recipe.optim.micro_batch)
        return max((dataset.load(k) for k in range(dataset.per_step)), key=lambda part: part.tokens.numel())

    def from_step(self, first: int) -> Iterator[GlobalBatch]:
        """Global batches `first`, `first + 1`, … to the end of the run."""
        dataset = MicroBatches(self.reader, self.plan, self.ranks, self.recipe.optim.micro_batch)
        loader = iter(self._loader(dataset, first))
        try:
            for step in range(first, self.total_steps):
                asked = time.monotonic()
                micro_batches = [_unless_damaged(next(loader)) for _ in range(dataset.per_step)]
                yield self._describe(step, micro_batches, time.monotonic() - asked)
        finally:
            del loader  # ends its processes, also when an error goes on its way up

    def _loader(self, dataset: MicroBatches, first: int) -> DataLoader:
        workers = self.recipe.data.workers
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first * dataset.per_step, self.total_steps * dataset.per_step),
            num_workers=workers,
            pin_memory=self.ranks.device.type == "cuda",
            # A forked child of a process that runs threads (Gloo's, NCCL's) can hang; a fork server's outlives a kill.
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=4 if workers else None,
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
            sources=self.sources.divide(
                ids, rank_slices(ids, self.ranks.rank, self.ranks.world_size, self.recipe.optim.micro_batch)
            ),
        )


def _outlive_sigterm(worker: int) -> None:
    """SLURM's preemption signals loading processes too; the rank, which it asks to stop, still needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unless_damaged(item: MicroBatch | DamagedShardError) -> MicroBatch:
    if isinstance(item, DamagedShardError):
        raise item
    return item


def check_fit(manifest: Manifest, recipe: Recipe) -> None:
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
