"""Source datasets of samples, so that losses and sample counts can be logged by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.data.plan import FILLER, Ids


@dataclass(frozen=True, kw_only=True)
class BatchSources:
    """The sources of a global batch. Each source is numbered by its position in `Sources.names`.

    Attributes:
        rows: [micro-batches, b] int64, the source of each row of this rank. Filler rows have an arbitrary source.
        samples: [sources], number of samples of all ranks.
        supervised_tokens: [sources], number of supervised tokens of all ranks.
    """

    rows: torch.Tensor
    samples: npt.NDArray[np.int64]
    supervised_tokens: npt.NDArray[np.int64]


class Sources:
    """The source datasets of all samples in an index. `names` is sorted."""

    def __init__(self, index: Any):
        column = index.column("source")
        self.names: list[str] = sorted(pc.unique(column).to_pylist())
        self.of_row = pc.index_in(column.cast(pa.string()), pa.array(self.names)).to_numpy().astype(np.int64)
        self.supervised_tokens = index.column("num_supervised_tokens").to_numpy()

    def of_batch(self, ids: Ids, rank_ids: Sequence[Ids]) -> BatchSources:
        """Return the sources of a global batch.

        Args:
            ids: index rows of the global batch, including FILLER.
            rank_ids: index rows of each micro-batch of this rank.
        """
        real = ids[ids != FILLER]
        source, count = self.of_row[real], len(self.names)
        supervised = np.bincount(source, self.supervised_tokens[real], minlength=count)
        return BatchSources(
            rows=torch.from_numpy(self.of_row[np.stack(rank_ids)]),
            samples=np.bincount(source, minlength=count),
            supervised_tokens=supervised.astype(np.int64),
        )
