"""The layout of a checkpoint: which file holds which piece of each parameter. It allows loading on any number of ranks.

ZeRO splits each parameter into pieces, and concatenates the pieces of one rank into flat buffers. The ZeRO stage and
the world size determine the split. A checkpoint holds the flat buffers of the ranks that saved it, and a layout file.
A run with another number of ranks looks up in the layout file where the pieces that it needs are stored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.folder import DamagedCheckpointError
from pipeline.errors import retryable_oserrors
from pipeline.zero import Piece
from preprocess.atomic import write_json

LAYOUT = "layout.json"
VALUE_BYTES = 4  # masters and moments are fp32 in every precision that a recipe can choose


@dataclass(frozen=True, kw_only=True)
class Read:
    """A copy of `count` values from offset `source` of a file to offset `target` of a buffer.

    Offsets are in values, not in bytes.
    """

    file: str
    source: int
    target: int
    count: int


class Layout:
    """The parameter pieces that each file of a checkpoint holds.

    Args:
        shapes: shape of each parameter before sharding.
        tied: maps each additional name of a tied parameter to its name in `shapes`.
        files: pieces by file name. The name has no suffix `.master`, `.exp_avg` or `.exp_avg_sq`.
    """

    def __init__(self, shapes: dict[str, list[int]], tied: dict[str, str], files: Mapping[str, Sequence[Piece]]):
        self.shapes, self.tied, self.files = shapes, tied, files
        self.pieces: dict[str, list[tuple[str, Piece]]] = {name: [] for name in shapes}
        for file, pieces in files.items():
            for piece in pieces:
                self.pieces[piece.name].append((file, piece))
        for located in self.pieces.values():
            located.sort(key=lambda file_and_piece: file_and_piece[1].start)

    def save(self, folder: Path) -> None:
        files = {file: [list(astuple(piece)) for piece in pieces] for file, pieces in self.files.items()}
        write_json(folder / LAYOUT, {"shapes": self.shapes, "tied": self.tied, "files": files}, indent=None)

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """Read the layout file of a checkpoint, which must have been verified before. Raises: RetryableError."""
        with retryable_oserrors(folder):
            table = json.loads((folder / LAYOUT).read_text())
        files = {file: [Piece(*values) for values in pieces] for file, pieces in table["files"].items()}
        return cls(table["shapes"], table["tied"], files)

    def file_of(self, pieces: tuple[Piece, ...]) -> str | None:
        """Return the file that holds exactly these pieces, or None if the checkpoint was saved with another split."""
        return next((file for file, held in self.files.items() if tuple(held) == pieces), None)

    def reads(self, wanted: Sequence[Piece]) -> list[Read]:
        """Return the reads that fill a buffer with the pieces `wanted`. Adjacent reads are merged.

        Raises: DamagedCheckpointError if a value is missing from all files.
        """
        reads: list[Read] = []
        for piece in wanted:
            position = piece.start
            for file, saved in self.pieces.get(piece.name, ()):
                begin, end = max(position, saved.start), min(piece.end, saved.end)
                if begin == position < end:
                    source, target = saved.offset + begin - saved.start, piece.offset + begin - piece.start
                    _append_or_merge(reads, Read(file=file, source=source, target=target, count=end - begin))
                    position = end
            if position != piece.end:
                raise DamagedCheckpointError(f"{piece.name}: no file of the checkpoint holds its value {position}")
        return reads

    def assemble(self, folder: Path, kind: str) -> dict[str, torch.Tensor]:
        """Read one kind of tensor (`master`, `exp_avg` or `exp_avg_sq`) of every parameter, and unshard it.

        A tied parameter is returned under each of its names.
        """
        tensors = {}
        for name, shape in self.shapes.items():
            flat = torch.empty(math.prod(shape))
            read_into(flat, folder, kind, self.reads([Piece(name, 0, flat.numel(), 0)]))
            tensors[name] = flat.view(shape)
        return tensors | {name: tensors[first] for name, first in self.tied.items()}


def full_state(folder: Path) -> dict[str, torch.Tensor]:
    """Read every trained tensor of a checkpoint, unsharded, in fp32, on the CPU."""
    return Layout.load(folder).assemble(folder, "master")


def _append_or_merge(reads: list[Read], new: Read) -> None:
    """Append `new`, or merge it into the last read if it directly follows that read in both file and buffer."""
    last = reads[-1] if reads else None
    if last and (last.file, last.source + last.count, last.target + last.count) == (new.file, new.source, new.target):
        reads[-1] = Read(file=last.file, source=last.source, target=last.target, count=last.count + new.count)
    else:
        reads.append(new)


def bytes_of(flat: torch.Tensor) -> memoryview:
    """Return the memory of a flat CPU tensor, without a copy."""
    array: Any = flat.numpy()
    return memoryview(array).cast("B")


def read_into(flat: torch.Tensor, folder: Path, kind: str, reads: Sequence[Read]) -> None:
    """Fill a flat fp32 CPU tensor from the files of a checkpoint, as `reads` says.

    Raises: OSError; DamagedCheckpointError if a file is too short.
    """
    memory = bytes_of(flat)
    handles: dict[str, int] = {}
    try:
        for read in reads:
            if read.file not in handles:
                handles[read.file] = os.open(folder / f"{read.file}.{kind}", os.O_RDONLY)
            start, size = read.target * VALUE_BYTES, read.count * VALUE_BYTES
            _read_exactly(handles[read.file], memory[start : start + size], read.source * VALUE_BYTES)
    finally:
        for handle in handles.values():
            os.close(handle)


def _read_exactly(handle: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):  # Linux reads at most 2 GB per call
        count = os.preadv(handle, [memory[done:]], offset + done)
        if not count:
            raise DamagedCheckpointError(f"the file ends {len(memory) - done} bytes too early")
        done += count
