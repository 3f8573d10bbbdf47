"""Verification of a shard set: every file is read, and compared with the manifest and the index.

Each sample is read twice, with the webdataset package and through the index, and the results must be equal.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from model.errors import UserError
from model.hashing import file_sha256
from preprocess.prompts import Tokenizer
from preprocess.rejects import REASONS, Rejected
from preprocess.shards.folder import INDEX, MANIFEST, REJECTS, TOKENIZER, WORK, ShardFolder
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.sample import META, TOKENS, Sample, from_fields, sample_pixels
from preprocess.shards.writer import read_fields

REMEDY = "delete the files named above and run build_shards.py with the same arguments again: it rebuilds only those"


@dataclass
class _Tally:
    """Counts of rows and samples, to be compared with the manifest.

    Attributes:
        rows: for each source, how many samples and rejects each row has. In an intact set, this is 1 for each row.
        unknown_rows: number of samples and rejects whose source or row is not in the manifest.
    """

    rows: dict[str, np.ndarray]
    unknown_rows: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)

    def add_row(self, source: str, row: int) -> None:
        if source in self.rows and 0 <= row < len(self.rows[source]):
            self.rows[source][row] += 1
        else:
            self.unknown_rows += 1

    def add_sample(self, sample: Sample) -> None:
        self.add_row(sample.source, sample.row)
        self.samples[sample.source] += 1
        self.totals.update(
            {
                "samples": 1,
                "with_image": int(sample.image is not None),
                "text_only": int(sample.image is None),
                "text_tokens": len(sample.tokens),
                "supervised_tokens": sample.num_supervised_tokens,
            }
        )


def verify(path: PathLike[str] | str, tick: Callable[[int], None] = lambda samples: None) -> Iterator[str]:
    """Yield one line for each problem of a shard set. After each shard, `tick` is called with its number of samples.

    Raises: UserError if there is no manifest.
    """
    folder = ShardFolder(Path(path))
    manifest = Manifest.load(folder)
    if folder.manifest.read_bytes() != manifest.to_bytes():
        yield f"{MANIFEST} differs from the file that was written, though its values are the same"
    yield from _file_problems(folder, manifest)
    yield from _hash_problems(folder, manifest)
    yield from _tokenizer_problems(folder, manifest)
    tally = _Tally({name: np.zeros(about["rows"], np.int32) for name, about in manifest.sources.items()})
    yield from _sample_problems(folder, manifest, tally, tick)
    yield from _reject_problems(folder, manifest, tally)
    yield from _row_problems(manifest, tally)


def _file_problems(folder: ShardFolder, manifest: Manifest) -> Iterator[str]:
    expected = {MANIFEST, INDEX, REJECTS, TOKENIZER, *manifest.sidecars, *(shard.name for shard in manifest.shards)}
    found = {path.name for path in folder.path.iterdir()} - {WORK}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} does not belong to the set" for name in sorted(found - expected))


def _hash_problems(folder: ShardFolder, manifest: Manifest) -> Iterator[str]:
    expected = {
        INDEX: manifest.index["sha256"],
        REJECTS: manifest.rejects["sha256"],
        TOKENIZER: manifest.tokenizer["sha256"],
        **manifest.sidecars,
    }
    for name, sha256 in expected.items():
        if folder.file(name).is_file() and file_sha256(folder.file(name)) != sha256:
            yield f"{name} has changed since it was written: its sha256 differs"


def _tokenizer_problems(folder: ShardFolder, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = Tokenizer(folder.tokenizer.read_bytes(), TOKENIZER)
    except (OSError, UserError):
        return  # already reported as missing or changed
    for name, found in (("vocab_size", tokenizer.vocab_size), ("eos_id", tokenizer.eos_id)):
        if manifest.tokenizer[name] != found:
            yield f"{TOKENIZER}: {name} is {found}, the manifest has {manifest.tokenizer[name]}"


def _sample_problems(
    folder: ShardFolder, manifest: Manifest, tally: _Tally, tick: Callable[[int], None]
) -> Iterator[str]:
    """Yield the problems of all samples. If the index is missing or damaged, the tars are checked without it."""
    index = _intact_index(folder, manifest)
    if index is not None and index.num_rows != manifest.index["rows"]:
        yield f"{INDEX} has {index.num_rows} rows, the manifest has {manifest.index['rows']}"
    first = 0
    for number, shard in enumerate(manifest.shards):
        rows = [None] * shard.samples if index is None else index.slice(first, shard.samples).to_pylist()
        first += shard.samples
        yield from _shard_problems(folder, manifest, number, rows, tally)
        tick(shard.samples)
    for name, found in tally.totals.items():
        if manifest.counts[name] != found:
            yield f"{MANIFEST}: {name} is {manifest.counts[name]}, found {found}"


def _intact_index(folder: ShardFolder, manifest: Manifest) -> pa.Table | None:
    """Return the index, or None if it is missing or its hash differs, because damaged bytes should not be parsed."""
    path = folder.index
    return load_index(folder) if path.is_file() and file_sha256(path) == manifest.index["sha256"] else None


def _shard_problems(
    folder: ShardFolder, manifest: Manifest, number: int, rows: list[dict[str, Any] | None], tally: _Tally
) -> Iterator[str]:
    shard = manifest.shards[number]
    path = folder.file(shard.name)
    if not path.is_file():
        return
    if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
        yield f"{shard.name} has changed since it was written: its size or sha256 differs"
        return
    read = 0
    with path.open("rb") as file:
        for row, (key, fields) in zip(rows, read_fields(path), strict=False):
            read += 1
            place = f"{shard.name}, sample {key}"
            yield from (f"{place}: {problem}" for problem in _index_problems(file.fileno(), number, key, fields, row))
            try:
                sample = from_fields(fields, key)
                yield from (f"{place}: {problem}" for problem in _value_problems(sample, manifest))
            except (ValueError, KeyError, TypeError, Rejected) as error:
                yield f"{place}: cannot be read ({error})"
                continue
            tally.add_sample(sample)
    if read != shard.samples:
        yield f"{shard.name} has {read} samples, the manifest has {shard.samples}"


def _index_problems(
    handle: int, shard: int, key: str, fields: Mapping[str, bytes], row: dict[str, Any] | None
) -> Iterator[str]:
    if row is None:
        return
    if row["shard"] != shard or row["key"] != key:
        yield f"the index has sample {row['key']} of shard {row['shard']} in its place"
        return
    image = next((name for name in fields if name not in (TOKENS, META)), None)
    for part, name in (("tokens", TOKENS), ("meta", META), ("image", image)):
        through_index = os.pread(handle, row[f"{part}_bytes"], row[f"{part}_offset"]) if row[f"{part}_bytes"] else None
        if through_index != (fields[name] if name else None):
            yield f"the {part} at the index's offset is not what webdataset reads"


def _value_problems(sample: Sample, manifest: Manifest) -> Iterator[str]:
    count = len(sample.tokens)
    if sample.tokens.dtype != np.uint16 or not 0 < count <= manifest.max_text_tokens:
        yield f"{count} tokens of {sample.tokens.dtype}, expected 1 to {manifest.max_text_tokens} of uint16"
    if count and int(sample.tokens.max()) >= manifest.tokenizer["vocab_size"]:
        yield f"token id {sample.tokens.max()} is too large: the tokenizer has {manifest.tokenizer['vocab_size']} ids"
    borders = [0, *(border for span in sample.spans for border in span), count]
    if not sample.spans or borders != sorted(borders) or any(start == end for start, end in sample.spans):
        yield f"spans {sample.spans} are not increasing ranges within {count} tokens"
    if sample.image is not None:
        px = manifest.image["px"]
        shape = sample_pixels(sample, px if manifest.image["encoding"] == "original" else None).shape
        if shape != (px, px, 3):
            yield f"the image is {shape}, expected {(px, px, 3)}"


def _reject_problems(folder: ShardFolder, manifest: Manifest, tally: _Tally) -> Iterator[str]:
    reasons = Counter[str]()
    try:
        with folder.rejects.open(encoding="utf-8") as lines:
            for entry in map(json.loads, lines):
                reasons[entry["reason"]] += 1
                tally.add_row(entry["source"], entry["row"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield f"{REJECTS} cannot be read ({error})"
        return
    if reasons != Counter(manifest.rejects_by_reason):
        yield f"{REJECTS} has {dict(reasons)}, the manifest has {manifest.rejects_by_reason}"
    yield from (f"{REJECTS}: unknown reason {reason!r}" for reason in reasons if reason not in REASONS)


def _row_problems(manifest: Manifest, tally: _Tally) -> Iterator[str]:
    """Yield a problem for each source in which some rows did not become exactly one sample or one reject."""
    for source, counts in tally.rows.items():
        for problem, count in (
            ("neither sample nor reject", (counts == 0).sum()),
            ("more than one", (counts > 1).sum()),
        ):
            if count:
                yield f"source {source!r}: {count} of {len(counts)} rows are {problem}"
        found, expected = tally.samples[source], manifest.sources[source]["samples"]
        if found != expected:
            yield f"source {source!r}: {found} samples, expected {expected}"
    if tally.unknown_rows:
        yield f"{tally.unknown_rows} samples or rejects have a source or row that the manifest does not have"
    totals = manifest.counts
    if totals["rows"] != totals["samples"] + totals["rejects"]:
        yield f"{MANIFEST}: {totals['rows']} rows are not {totals['samples']} samples + {totals['rejects']} rejects"
