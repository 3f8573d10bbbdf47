"""Which source dataset each sample comes from, so that losses can be told apart by it."""

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


@dataclass(frozen=True)
class BySource:
    """A global batch by source: the sources are numbered as in `Sources.names`."""

    rows: torch.Tensor  # of this rank: [micro-batches, b] int64; a filler row has any number
    samples: npt.NDArray[np.int64]  # [sources], of all ranks
    supervised_tokens: npt.NDArray[np.int64]  # [sources], of all ranks


class Sources:
    """The sources of an index, by name and in that order."""

    def __init__(self, index: Any):
        column = index.column("source")
        self.names: list[str] = sorted(pc.unique(column).to_pylist())
        self.of_row = pc.index_in(column.cast(pa.string()), pa.array(self.names)).to_numpy().astype(np.int64)
        self.supervised = index.column("num_supervised_tokens").to_numpy()

    def divide(self, ids: Ids, mine: Sequence[Ids]) -> BySource:
        """`ids`: rows of the index that make the step, FILLER among them; `mine`: this rank's, per micro-batch."""
        real = ids[ids != FILLER]
        counted = {"minlength": len(self.names)}
        return BySource(
            rows=torch.from_numpy(self.of_row[np.stack(mine)]),
            samples=np.bincount(self.of_row[real], **counted),
            supervised_tokens=np.bincount(self.of_row[real], self.supervised[real], **counted).astype(np.int64),
        )
