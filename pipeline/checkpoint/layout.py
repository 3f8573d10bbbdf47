"""Where each parameter's numbers lie in ZeRO's flat buffers: on this rank now, and on the ranks that saved.

ZeRO cuts parameters into pieces and lays those of a rank end to end; its stage and the number of ranks decide which. A
checkpoint keeps the buffers as they lie, with a map of them. By that map any number of ranks finds its pieces.
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

from model.errors import UserError
from pipeline.errors import retryable_oserrors
from pipeline.zero import Piece
from preprocess.atomic import write_json

LAYOUT = "layout.json"
NUMBER_BYTES = 4  # master weights and moments are fp32 in every precision that a recipe can ask for


@dataclass(frozen=True)
class Read:
    """`count` numbers at `source` of a file belong at `target` of a buffer."""

    file: str
    source: int
    target: int
    count: int


class Layout:
    """The map of a checkpoint: which file holds which piece. `files` are names without the kind that follows them."""

    def __init__(self, shapes: dict[str, list[int]], tied: dict[str, str], files: Mapping[str, Sequence[Piece]]):
        self.shapes, self.tied, self.files = shapes, tied, files
        self.pieces: dict[str, list[tuple[str, Piece]]] = {name: [] for name in shapes}
        for file, pieces in files.items():
            for piece in pieces:
                self.pieces[piece.name].append((file, piece))
        for found in self.pieces.values():
            found.sort(key=lambda place: place[1].start)

    def save(self, folder: Path) -> None:
        files = {file: [list(astuple(piece)) for piece in pieces] for file, pieces in self.files.items()}
        write_json(folder / LAYOUT, {"shapes": self.shapes, "tied": self.tied, "files": files}, indent=None)

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """Of a checkpoint whose map was found to be as it was written. Raises: RetryableError."""
        with retryable_oserrors(f"{folder}"):
            table = json.loads((folder / LAYOUT).read_text())
        files = {file: [Piece(*values) for values in pieces] for file, pieces in table["files"].items()}
        return cls(table["shapes"], table["tied"], files)

    def file_of(self, pieces: tuple[Piece, ...]) -> str | None:
        """The file that holds these pieces as they lie, and no others; None if the ranks or the stage were others."""
        return next((file for file, held in self.files.items() if tuple(held) == pieces), None)

    def reads(self, wanted: Sequence[Piece]) -> list[Read]:
        """What fills a buffer of these pieces; neighbours are read in one go.

        Raises: UserError if some number is in no file.
        """
        reads: list[Read] = []
        for piece in wanted:
            found = piece.start
            for file, saved in self.pieces.get(piece.name, ()):
                begin, end = max(found, saved.start), min(piece.end, saved.end)
                if begin == found < end:
                    source, target = saved.offset + begin - saved.start, piece.offset + begin - piece.start
                    _extend(reads, Read(file, source, target, end - begin))
                    found = end
            if found != piece.end:
                raise UserError(f"{piece.name}: the checkpoint holds nothing of it from number {found} on")
        return reads

    def whole(self, folder: Path, kind: str) -> dict[str, torch.Tensor]:
        """Every parameter's numbers of that kind, assembled, under each of its names."""
        tensors = {}
        for name, shape in self.shapes.items():
            flat = torch.empty(math.prod(shape))
            fill(flat, folder, kind, self.reads([Piece(name, 0, flat.numel(), 0)]))
            tensors[name] = flat.view(shape)
        return tensors | {name: tensors[first] for name, first in self.tied.items()}


def _extend(reads: list[Read], new: Read) -> None:
    """Append a read, or lengthen the last one if the new one goes on where it ends, in the file and in the buffer."""
    last = reads[-1] if reads else None
    if last and (last.file, last.source + last.count, last.target + last.count) == (new.file, new.source, new.target):
        reads[-1] = Read(last.file, last.source, last.target, last.count + new.count)
    else:
        reads.append(new)


def bytes_of(flat: torch.Tensor) -> memoryview:
    """A flat tensor on the CPU, seen as bytes."""
    array: Any = flat.numpy()
    return memoryview(array).cast("B")


def fill(flat: torch.Tensor, folder: Path, kind: str, reads: Sequence[Read]) -> None:
    """Read into a flat fp32 tensor on the CPU. Raises: OSError; UserError if a file is too short."""
    memory = bytes_of(flat)
    handles: dict[str, int] = {}
    try:
        for read in reads:
            if read.file not in handles:
                handles[read.file] = os.open(folder / f"{read.file}.{kind}", os.O_RDONLY)
            at, size = read.target * NUMBER_BYTES, read.count * NUMBER_BYTES
            _read_exactly(handles[read.file], memory[at : at + size], read.source * NUMBER_BYTES)
    finally:
        for handle in handles.values():
            os.close(handle)


def _read_exactly(handle: int, memory: memoryview, offset: int) -> None:
    """One call reads 2 GB at most."""
    done = 0
    while done < len(memory):
        count = os.preadv(handle, [memory[done:]], offset + done)
        if not count:
            raise UserError(f"the file ends {len(memory) - done} bytes too early")
        done += count
