"""Which samples make which step: a pure function of (manifest, seed, epoch, step).

Every global batch is of one modality, so that all ranks run the same modules. World size, micro-batch and number of
loading processes only choose a slice of it: to go on, the plan needs one number, the optimizer step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
FILLER = -1  # stands in the last, incomplete batch of a modality; its rows count for nothing


@dataclass(frozen=True, eq=False)
class Plan:
    """`text_tokens` [N] and `has_image` [N] describe the samples by their row in the index.

    Raises: ValueError if there is no sample at all.
    """

    text_tokens: npt.NDArray[np.int32]
    has_image: npt.NDArray[np.bool_]
    manifest_sha256: str
    seed: int
    global_batch: int
    window: int

    def __post_init__(self) -> None:
        if not len(self.text_tokens):
            raise ValueError("a plan over no samples")

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-int(count) // self.global_batch) for count in (self.has_image.sum(), (~self.has_image).sum()))

    def step(self, step: int) -> Ids:
        """Rows of the index that make optimizer step `step` (0-based, over all epochs): [global_batch], FILLER last."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """All global batches of one epoch, in order: [steps_per_epoch, global_batch]. Each sample stands there once."""
        return _epoch(self, epoch)

    def _batches(self, epoch: int) -> npt.NDArray[np.int64]:
        modalities = [np.flatnonzero(self.has_image), np.flatnonzero(~self.has_image)]
        batches = np.concatenate([self._windows(rows, f"{epoch}:{kind}") for kind, rows in enumerate(modalities)])
        batches = batches[_permutation(len(batches), f"{self._stream}:{epoch}:batches")]
        if epoch == 0:
            # The longest first: if memory runs out, it does so in the first step.
            cost = np.where(batches >= 0, self.text_tokens[batches], 0).max(axis=1)
            longest = int(np.argmax(cost + (1 << 20) * self.has_image[batches[:, 0]]))
            batches[[0, longest]] = batches[[longest, 0]]
        return batches

    def _windows(self, rows: Ids, stream: str) -> npt.NDArray[np.int64]:
        """Permute, sort by length inside each window of `window` global batches, cut into global batches."""
        rows = rows[_permutation(len(rows), f"{self._stream}:{stream}")]
        size = self.window * self.global_batch
        windows = [rows[start : start + size] for start in range(0, len(rows), size)]
        ordered = [part[np.argsort(self.text_tokens[part], kind="stable")] for part in windows]
        missing = -len(rows) % self.global_batch
        return np.concatenate([*ordered, np.full(missing, FILLER)]).reshape(-1, self.global_batch).astype(np.int64)

    @property
    def _stream(self) -> str:
        return f"{self.manifest_sha256}:{self.seed}"


def rank_slices(ids: Ids, rank: int, world_size: int, micro_batch: int) -> list[Ids]:
    """The micro-batches of one rank, in order; neighbours in length meet in the same forward pass of all ranks."""
    return list(ids.reshape(-1, world_size, micro_batch)[:, rank])


@lru_cache(maxsize=2)
def _epoch(plan: Plan, epoch: int) -> npt.NDArray[np.int64]:
    return plan._batches(epoch)


def _permutation(count: int, stream: str) -> Ids:
    """Of range(count), from the stream's name. Philox's raw output never changes between NumPy versions."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)
