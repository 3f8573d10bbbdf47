"""Mixes: TOML files that name the annotation files of a shard set and how its images are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from model.errors import UserError
from preprocess.annotations.dialogue import Format
from preprocess.strict_toml import Key, Range, parse_table, read_toml

Encoding = Literal["jpeg", "raw", "original"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One annotation file of a mix."""

    name: str
    """Name of the source in counts and rejects."""

    format: Format
    """Format of the rows."""

    annotations: str
    """Path of a JSON array, JSONL or Parquet file, also compressed as .gz or .zst, relative to the data root."""

    images: str = ""
    """Folder that the image paths in the rows are relative to. It is itself relative to the data root."""

    expected_rows: int | None = None
    """Expected number of rows in the file. A build reports a different number, unless `limit` leaves rows unread."""

    limit: Annotated[int | None, Range(least=1)] = None
    """Read only this many rows, from the start of the file."""

    weight: float = 1.0
    """How often each row is used: 3 uses every row three times, 0.5 uses every second row."""

    def times(self, row: int) -> int:
        """Return how many times row number `row` is used. The first n rows are used ⌊n × weight⌋ times in all."""
        return math.floor((row + 1) * self.weight) - math.floor(row * self.weight)


@dataclass(frozen=True, kw_only=True)
class ExpectedRows:
    """Number of rows that several sources have together, for data sets that publish only this sum."""

    sources: tuple[str, ...]
    """Names of the sources."""

    rows: int
    """Sum of the rows of their files."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How images are stored in the shards."""

    encoding: Encoding = "jpeg"
    """Encoding: JPEG or raw pixels, both at the model's image size, or the original file unchanged."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Annotation files of a shard set, and how its images are stored."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None: the preset's."""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How images are stored."""

    archives: dict[str, str] = field(default_factory=dict)
    """Zip or tar file of each image folder that is not unpacked, if the file is not named after the folder."""

    sources: Annotated[tuple[Source, ...], Key("source")] = ()
    """Annotation files, in the order of their rows in the shard set."""

    expected: tuple[ExpectedRows, ...] = ()
    """Expected numbers of rows of several sources together."""


def load_mix(path: Path) -> Mix:
    """Load a mix from a TOML file. Raises: UserError that names the file, the key and what is valid."""
    mix = parse_table(Mix, read_toml(path, what="mix", shipped="preprocess/mixes"), str(path))
    names = [source.name for source in mix.sources]
    if not names:
        raise UserError(f"{path}: no source; add at least one [[source]] table")
    for number, source in enumerate(mix.sources, 1):
        where = f"{path}: [[source]] {number}"
        if names.count(source.name) > 1:
            raise UserError(f"{where}: two sources are named {source.name!r}; rows are counted by name, so rename one")
        if not 0 < source.weight < math.inf:
            raise UserError(
                f"{where}: weight: found {source.weight}, expected a number above 0; "
                "to use no rows, leave the source out"
            )
    for number, expected in enumerate(mix.expected, 1):
        for name in expected.sources:
            if name not in names:
                known = ", ".join(sorted(names))
                raise UserError(f"{path}: [[expected]] {number}: no source is named {name!r}; sources: {known}")
    return mix
