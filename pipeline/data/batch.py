"""Training batches: `MicroBatch` for one forward pass, `GlobalBatch` for one optimizer step, and `collate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.config import IGNORE_INDEX, PAD_ID
from pipeline.data.by_source import BatchSources
from pipeline.data.plan import Ids
from pipeline.data.shard_reader import Pixels, SlowRead
from preprocess.shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows that one rank processes in one forward pass.

    Attributes:
        tokens: [b, t] int64, padded on the right.
        targets: [b, t] int64, IGNORE_INDEX where not supervised.
        pixels: [b, 3, h, w] uint8, None for text-only batches. Channels-last in memory until `to` is called.
        real: [b] bool, False for filler rows, which have no effect on the loss.
        slow_reads: reads that were slow while the rows were loaded.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    pixels: torch.Tensor | None
    real: torch.Tensor
    slow_reads: tuple[SlowRead, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True).contiguous())

    def pin_memory(self) -> MicroBatch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {n: function(v) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One rank's micro-batches for an optimizer step, and totals over all ranks, which are computed from the index.

    Attributes:
        ids: index rows of the samples of all ranks, without filler.
        samples, images, supervised_tokens: totals over all ranks.
        tokens: visual and text tokens of all ranks, without padding.
        padding_ratio: share of padding in the positions that all ranks compute. In each forward pass, every row counts
            as long as the longest row of all ranks, because the ranks run in lockstep.
        wait_s: seconds that the training loop of this rank waited for this batch.
        slow_reads: slow reads of this rank.
    """

    step: int
    micro_batches: list[MicroBatch]
    ids: Ids
    samples: int
    images: int
    supervised_tokens: int
    tokens: int
    padding_ratio: float
    wait_s: float
    sources: BatchSources
    slow_reads: tuple[SlowRead, ...] = ()


def collate(rows: list[tuple[Sample, Pixels | None]], real: npt.NDArray[np.bool_]) -> MicroBatch:
    """Collate rows of one modality into a micro-batch, padded on the right to the longest row.

    Args:
        real: [b], False for filler rows, whose targets are not supervised.
    """
    shape = (len(rows), max(len(sample.tokens) for sample, _ in rows))
    tokens, targets = torch.full(shape, PAD_ID), torch.full(shape, IGNORE_INDEX)
    for i, (sample, _) in enumerate(rows):
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        tokens[i, : len(ids)] = ids
        for start, end in sample.spans if real[i] else ():
            targets[i, start:end] = ids[start:end]
    images = [pixels for _, pixels in rows if pixels is not None]
    assert len(images) in (0, len(rows)), "a global batch is of one modality"
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else None
    return MicroBatch(tokens=tokens, targets=targets, pixels=pixels, real=torch.from_numpy(real))
