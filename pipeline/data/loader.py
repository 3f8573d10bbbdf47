"""The training data loader: reads the samples of each global batch from the shards, in the order of the plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from pipeline.data.batch import GlobalBatch, MicroBatch, collate
from pipeline.data.by_source import Sources
from pipeline.data.compatibility import check_shards_match_model
from pipeline.data.plan import FILLER, Ids, Plan, rank_slices
from pipeline.data.shard_reader import DamagedShardError, ShardReader
from pipeline.data.workers import Workers
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.stall_warning import StallWarning
from pipeline.errors import RetryableError
from pipeline.recipe import Recipe


class MicroBatchDataset(Dataset):
    """All micro-batches of one rank in a run, by index. Any process can load any micro-batch."""

    def __init__(self, reader: ShardReader, plan: Plan, ranks: Ranks, micro_batch: int):
        self.reader, self.plan, self.ranks, self.micro_batch = reader, plan, ranks, micro_batch
        self.per_step = plan.global_batch // (ranks.world_size * micro_batch)

    def __getitem__(self, k: int) -> MicroBatch | DamagedShardError | RetryableError:
        """Load micro-batch `k`. Return errors, because a DataLoader worker would wrap a raised error in a traceback."""
        try:
            return self.load(k)
        except (DamagedShardError, RetryableError) as error:
            return error

    def rank_slices(self, ids: Ids) -> list[Ids]:
        """Return, for each micro-batch of this rank, its index rows among the `ids` of a global batch."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        return rank_slices(ids, rank=rank, world_size=world_size, micro_batch=self.micro_batch)

    def load(self, k: int) -> MicroBatch:
        """Load micro-batch `k`. Filler rows hold a copy of the step's first sample."""
        step, micro = divmod(k, self.per_step)
        ids = self.plan.step(step)
        rank_ids = self.rank_slices(ids)[micro]
        real = rank_ids != FILLER
        batch = collate([self.reader.read(int(row)) for row in np.where(real, rank_ids, ids[0])], real)
        return replace(batch, slow_reads=self.reader.pop_slow_reads())


class TrainData:
    """One rank's view of the training data: an iterator over global batches, which can begin at any step.

    Raises: UserError if the shards do not match the recipe's model.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.reader = ShardReader(recipe.data.shards)
        self.stall_warning = StallWarning()
        check_shards_match_model(self.reader.manifest, recipe)
        index = self.reader.index
        self.text_tokens = index.column("num_text_tokens").to_numpy()
        self.supervised_tokens = index.column("num_supervised_tokens").to_numpy()
        self.sources = Sources(index)
        self.plan = Plan(
            text_tokens=self.text_tokens,
            has_image=index.column("has_image").to_numpy(zero_copy_only=False),
            manifest_sha256=self.reader.manifest.sha256,
            seed=recipe.seed,
            global_batch=recipe.optim.global_batch,
            window=recipe.data.window,
        )
        self.dataset = MicroBatchDataset(self.reader, self.plan, ranks, recipe.optim.micro_batch)
        self._started: tuple[int, Workers] | None = None  # the step that workers were started for, and the workers

    @property
    def total_steps(self) -> int:
        return self.recipe.steps or self.recipe.data.epochs * self.plan.steps_per_epoch

    def heaviest_micro_batch(self) -> MicroBatch:
        """Load this rank's largest micro-batch. It is in the first step, where the plan puts the longest rows."""
        first_step = (self.dataset.load(k) for k in range(self.dataset.per_step))
        return max(first_step, key=lambda micro_batch: micro_batch.tokens.numel())

    def start_workers(self, first: int) -> None:
        """Start the workers for `from_step(first)` now, so that they load while the model is being built."""
        self._started = (first, self._workers(first))

    def from_step(self, first: int) -> Iterator[GlobalBatch]:
        """Yield the global batches `first`, `first + 1`, … to the end of the run."""
        started_for, workers = self._started or (None, None)
        self._started = None
        if workers is None or started_for != first:
            workers = self._workers(first)
        try:
            for step in range(first, self.total_steps):
                begun = time.monotonic()
                with self.stall_warning.warn_if_slow(workers.describe_wait):
                    micro_batches = [workers.next() for _ in range(self.dataset.per_step)]
                yield self._global_batch(step, micro_batches, wait_s=time.monotonic() - begun)
        finally:
            workers.close()

    def _workers(self, first: int) -> Workers:
        per_step = self.dataset.per_step
        return Workers(self.dataset, range(first * per_step, self.total_steps * per_step), self.recipe, self.ranks)

    def _global_batch(self, step: int, micro_batches: list[MicroBatch], *, wait_s: float) -> GlobalBatch:
        """Build the global batch of a step from this rank's micro-batches and from totals in the index."""
        ids = self.plan.step(step)
        real = ids[ids != FILLER]
        has_image = bool(self.plan.has_image[ids[0]])
        visual_tokens = self.recipe.config.vision.num_patches if has_image else 0
        lengths = np.where(ids == FILLER, 0, self.text_tokens[ids] + visual_tokens)
        # ZeRO-3 runs the ranks in lockstep, so the longest row of any rank determines the cost on all ranks.
        forward_passes = lengths.reshape(self.dataset.per_step, -1)
        computed = int(forward_passes.max(axis=1).sum()) * forward_passes.shape[1]
        return GlobalBatch(
            step=step,
            micro_batches=micro_batches,
            ids=real,
            samples=len(real),
            images=len(real) if has_image else 0,
            supervised_tokens=int(self.supervised_tokens[real].sum()),
            tokens=int(lengths.sum()),
            padding_ratio=1 - int(lengths.sum()) / max(1, computed),
            wait_s=wait_s,
            slow_reads=tuple(read for micro_batch in micro_batches for read in micro_batch.slow_reads),
            sources=self.sources.of_batch(ids, self.dataset.rank_slices(ids)),
        )
