"""Training plan: the samples of each optimizer step, as a pure function of (manifest, seed, epoch, step).

Every global batch is of one modality, so that all ranks run the same modules. World size, micro-batch and number of
DataLoader workers only determine how a global batch is sliced. To resume, a run needs only the step number.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
FILLER = -1  # fills up the last batch of each modality; filler rows have no effect on the loss


def count_steps(*, with_image: int, text_only: int, global_batch: int) -> int:
    """Return the number of steps per epoch. Samples with an image and text-only ones fill separate global batches."""
    return -(-with_image // global_batch) + -(-text_only // global_batch)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """Deterministic order of the training samples.

    Attributes:
        text_tokens: [samples], number of text tokens of each sample, in the order of the index.
        has_image: [samples], whether the sample has an image.
        window: number of global batches inside which samples are sorted by length.

    Raises: ValueError if there are no samples.
    """

    text_tokens: npt.NDArray[np.int32]
    has_image: npt.NDArray[np.bool_]
    manifest_sha256: str
    seed: int
    global_batch: int
    window: int

    def __post_init__(self) -> None:
        if not len(self.text_tokens):
            raise ValueError("no samples to plan")

    @property
    def steps_per_epoch(self) -> int:
        with_image = int(self.has_image.sum())
        text_only = len(self.has_image) - with_image
        return count_steps(with_image=with_image, text_only=text_only, global_batch=self.global_batch)

    def step(self, step: int) -> Ids:
        """Return the index rows of a step's global batch, [global_batch]. FILLER is at the end.

        Args:
            step: number of the optimizer step, counted from 0 over all epochs.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the global batches of an epoch in order: [steps_per_epoch, global_batch]. Each sample occurs once."""
        return _epoch(self, epoch)

    def _batches(self, epoch: int) -> npt.NDArray[np.int64]:
        modalities = [np.flatnonzero(self.has_image), np.flatnonzero(~self.has_image)]
        batches = np.concatenate([self._windows(rows, f"{epoch}:{kind}") for kind, rows in enumerate(modalities)])
        batches = batches[_permutation(len(batches), f"{self._stream}:{epoch}:batches")]
        if epoch == 0:
            # Put the longest batch first, so that memory runs out in the first step or never.
            cost = np.where(batches >= 0, self.text_tokens[batches], 0).max(axis=1)
            longest = int(np.argmax(cost + (1 << 20) * self.has_image[batches[:, 0]]))
            batches[[0, longest]] = batches[[longest, 0]]
        return batches

    def _windows(self, rows: Ids, stream: str) -> npt.NDArray[np.int64]:
        """Permute rows of one modality, sort them by length inside each window, and cut them into global batches."""
        rows = rows[_permutation(len(rows), f"{self._stream}:{stream}")]
        size = self.window * self.global_batch
        windows = [rows[start : start + size] for start in range(0, len(rows), size)]
        ordered = [part[np.argsort(self.text_tokens[part], kind="stable")] for part in windows]
        missing = -len(rows) % self.global_batch
        return np.concatenate([*ordered, np.full(missing, FILLER)]).reshape(-1, self.global_batch).astype(np.int64)

    @property
    def _stream(self) -> str:
        return f"{self.manifest_sha256}:{self.seed}"


def rank_slices(ids: Ids, *, rank: int, world_size: int, micro_batch: int) -> list[Ids]:
    """Return the index rows of each micro-batch of one rank, in order.

    Consecutive rows, which have similar lengths, go to the same forward pass on all ranks, to save padding.
    """
    return list(ids.reshape(-1, world_size, micro_batch)[:, rank])


@lru_cache(maxsize=2)
def _epoch(plan: Plan, epoch: int) -> npt.NDArray[np.int64]:
    return plan._batches(epoch)


def _permutation(count: int, stream: str) -> Ids:
    """Return a permutation of range(count), seeded by the name of the stream.

    It uses Philox's raw output, which is the same in all versions of NumPy.
    """
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)
