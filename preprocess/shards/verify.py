"""Reads a whole shard set again and names everything about it that is not as it was built.

Samples are read by the stock webdataset package, and again through the index: two readers that must agree.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from model.errors import UserError
from model.hashing import file_sha256
from preprocess.prompts import Tokenizer
from preprocess.rejects import REASONS, Rejected
from preprocess.shards.manifest import INDEX, MANIFEST, REJECTS, TOKENIZER, WORK, Manifest, load_index
from preprocess.shards.sample import META, TOKENS, Sample, from_fields, sample_pixels
from preprocess.shards.writer import read_fields

REMEDY = "delete what is named and run build_shards.py with the same arguments again: only that is built anew"


@dataclass
class _Account:
    """How often each row of each source has been met (it must be once), and the totals that the manifest tells."""

    rows: dict[str, np.ndarray]
    strangers: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)

    def meet(self, source: str, row: int) -> None:
        if source in self.rows and 0 <= row < len(self.rows[source]):
            self.rows[source][row] += 1
        else:
            self.strangers += 1

    def add(self, sample: Sample) -> None:
        self.meet(sample.source, sample.row)
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


def verify(folder: Path, tick: Callable[[int], None] = lambda samples: None) -> Iterator[str]:
    """Yields one line per problem; a sound set yields none. `tick` is told how many more samples have been read.

    Raises: UserError if there is no manifest.
    """
    manifest = Manifest.load(folder)
    if (folder / MANIFEST).read_bytes() != manifest.to_bytes():
        yield f"{MANIFEST} is not spelled as it was written"
    yield from _files(folder, manifest)
    yield from _hashes(folder, manifest)
    yield from _tokenizer(folder, manifest)
    account = _Account({name: np.zeros(about["rows"], np.int32) for name, about in manifest.sources.items()})
    yield from _samples(folder, manifest, account, tick)
    yield from _rejects(folder, manifest, account)
    yield from _balance(manifest, account)


def _files(folder: Path, manifest: Manifest) -> Iterator[str]:
    expected = {MANIFEST, INDEX, REJECTS, TOKENIZER, *manifest.sidecars, *(shard.name for shard in manifest.shards)}
    found = {path.name for path in folder.iterdir()} - {WORK}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} does not belong to the set" for name in sorted(found - expected))


def _hashes(folder: Path, manifest: Manifest) -> Iterator[str]:
    expected = {
        INDEX: manifest.index["sha256"],
        REJECTS: manifest.rejects["sha256"],
        TOKENIZER: manifest.tokenizer["sha256"],
        **manifest.sidecars,
    }
    for name, sha256 in expected.items():
        if (folder / name).is_file() and file_sha256(folder / name) != sha256:
            yield f"{name} is not what was written: its sha256 differs"


def _tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = Tokenizer((folder / TOKENIZER).read_bytes(), TOKENIZER)
    except (OSError, UserError):
        return  # named as missing or changed already
    for name, found in (("vocab_size", tokenizer.vocab_size), ("eos_id", tokenizer.eos_id)):
        if manifest.tokenizer[name] != found:
            yield f"{TOKENIZER}: {name} is {found}, the manifest says {manifest.tokenizer[name]}"


def _samples(folder: Path, manifest: Manifest, account: _Account, tick: Callable[[int], None]) -> Iterator[str]:
    """Without a sound index the tars are read all the same, and only not compared with it."""
    index = _index(folder, manifest)
    if index is not None and index.num_rows != manifest.index["rows"]:
        yield f"{INDEX} has {index.num_rows} rows, the manifest says {manifest.index['rows']}"
    first = 0
    for number, shard in enumerate(manifest.shards):
        rows = [None] * shard.samples if index is None else index.slice(first, shard.samples).to_pylist()
        first += shard.samples
        yield from _shard(folder, manifest, number, rows, account)
        tick(shard.samples)
    for name, found in account.totals.items():
        if manifest.counts[name] != found:
            yield f"{MANIFEST}: {name} is {manifest.counts[name]}, found {found}"


def _index(folder: Path, manifest: Manifest) -> pa.Table | None:
    """None if it is not what was written, which has been said by then: whatever its bytes have become is not parsed."""
    path = folder / INDEX
    return load_index(folder) if path.is_file() and file_sha256(path) == manifest.index["sha256"] else None


def _shard(
    folder: Path, manifest: Manifest, number: int, rows: list[dict[str, Any] | None], account: _Account
) -> Iterator[str]:
    shard = manifest.shards[number]
    path = folder / shard.name
    if not path.is_file():
        return
    if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
        yield f"{shard.name} is not what was written: its size or sha256 differs"
        return
    read = 0
    with path.open("rb") as file:
        for row, (key, fields) in zip(rows, read_fields(path), strict=False):
            read += 1
            place = f"{shard.name}, sample {key}"
            yield from (f"{place}: {problem}" for problem in _against_index(file.fileno(), number, key, fields, row))
            try:
                sample = from_fields(fields, key)
                yield from (f"{place}: {problem}" for problem in _within_limits(sample, manifest))
            except (ValueError, KeyError, TypeError, Rejected) as error:
                yield f"{place}: cannot be read ({error})"
                continue
            account.add(sample)
    if read != shard.samples:
        yield f"{shard.name} has {read} samples, the manifest says {shard.samples}"


def _against_index(
    handle: int, shard: int, key: str, fields: Mapping[str, bytes], row: dict[str, Any] | None
) -> Iterator[str]:
    if row is None:
        return
    if row["shard"] != shard or row["key"] != key:
        yield f"the index has sample {row['key']} of shard {row['shard']} in its place"
        return
    picture = next((name for name in fields if name not in (TOKENS, META)), None)
    for part, name in (("tokens", TOKENS), ("meta", META), ("image", picture)):
        through_index = os.pread(handle, row[f"{part}_bytes"], row[f"{part}_offset"]) if row[f"{part}_bytes"] else None
        if through_index != (fields[name] if name else None):
            yield f"the index finds another {part} than webdataset does"


def _within_limits(sample: Sample, manifest: Manifest) -> Iterator[str]:
    count = len(sample.tokens)
    if sample.tokens.dtype != np.uint16 or not 0 < count <= manifest.max_text_tokens:
        yield f"{count} tokens of {sample.tokens.dtype}, expected 1 to {manifest.max_text_tokens} of uint16"
    if count and int(sample.tokens.max()) >= manifest.tokenizer["vocab_size"]:
        yield f"token id {sample.tokens.max()}, the tokenizer has {manifest.tokenizer['vocab_size']}"
    borders = [0, *(border for span in sample.spans for border in span), count]
    if not sample.spans or borders != sorted(borders) or any(start == end for start, end in sample.spans):
        yield f"spans {sample.spans} are not increasing ranges within {count} tokens"
    if sample.image is not None:
        px = manifest.image["px"]
        shape = sample_pixels(sample, px if manifest.image["encoding"] == "original" else None).shape
        if shape != (px, px, 3):
            yield f"the picture is {shape}, expected {(px, px, 3)}"


def _rejects(folder: Path, manifest: Manifest, account: _Account) -> Iterator[str]:
    reasons = Counter[str]()
    try:
        with (folder / REJECTS).open(encoding="utf-8") as lines:
            for entry in map(json.loads, lines):
                reasons[entry["reason"]] += 1
                account.meet(entry["source"], entry["row"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield f"{REJECTS} cannot be read ({error})"
        return
    if reasons != Counter(manifest.rejects_by_reason):
        yield f"{REJECTS} counts {dict(reasons)}, the manifest {manifest.rejects_by_reason}"
    yield from (f"{REJECTS}: unknown reason {reason!r}" for reason in reasons if reason not in REASONS)


def _balance(manifest: Manifest, account: _Account) -> Iterator[str]:
    """Every row of every source is one sample or one reject."""
    for source, met in account.rows.items():
        for problem, count in (("neither sample nor reject", (met == 0).sum()), ("more than one", (met > 1).sum())):
            if count:
                yield f"source {source!r}: {count} of {len(met)} rows are {problem}"
        found, expected = account.samples[source], manifest.sources[source]["samples"]
        if found != expected:
            yield f"source {source!r}: {found} samples, expected {expected}"
    if account.strangers:
        yield f"{account.strangers} samples or rejects are of rows that no source has"
    counts = manifest.counts
    if counts["rows"] != counts["samples"] + counts["rejects"]:
        yield f"{MANIFEST}: {counts['rows']} rows are not {counts['samples']} samples + {counts['rejects']} rejects"
