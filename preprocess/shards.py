"""Shards on disk: deterministic tars, published atomically, each with a sidecar; then a manifest and an index.

A file is complete or absent: it is written under a temporary name, synced, renamed, and its folder synced. The manifest
comes last, so a set without one is not a set. Any POSIX file system will do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError, first_line
from preprocess.records import META, TOKENS, Sample, to_fields
from preprocess.tars import add_member, end_tar

FORMAT = 2
MANIFEST, INDEX, REJECTS, PROGRESS = "manifest.json", "index.parquet", "rejects.jsonl", "progress.json"
TOKENIZER, WORK = "tokenizer.json", ".work"

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        *((name, pa.int64()) for name in ("tokens_offset", "tokens_bytes", "meta_offset", "meta_bytes")),
        *((name, pa.int64()) for name in ("image_offset", "image_bytes")),
        ("num_text_tokens", pa.int32()),
        ("num_supervised_tokens", pa.int32()),
        ("has_image", pa.bool_()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("id", pa.string()),
    ]
)


# -- Atomic files ----------------------------------------------------------------------------------------------------


class HashingFile:
    """A file that only grows, and knows the sha256 of what it holds. `published` closes it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def published(path: Path) -> Iterator[HashingFile]:
    """A file that appears under its name when the block ends without an error, and never in part."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield HashingFile(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish(path: Path, data: bytes) -> str:
    """Publishes the bytes; returns their sha256."""
    with published(path) as file:
        file.write(data)
    return file.sha256


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any, indent: int | None = 1) -> bytes:
    """The one spelling of a value: sorted keys, ASCII, a newline at the end. Without indent it is fast."""
    return json.dumps(value, sort_keys=True, indent=indent).encode() + b"\n"


# -- One shard -------------------------------------------------------------------------------------------------------


@dataclass
class WrittenShard:
    """What a shard holds, in the index's columns, and the identity of its bytes."""

    sha256: str
    bytes: int
    samples: int
    columns: dict[str, list[Any]]


def write_shard(path: Path, samples: Iterable[Sample]) -> WrittenShard:
    """Publishes a tar whose bytes depend on nothing but the samples. Without samples there is no file."""
    columns: dict[str, list[Any]] = {name: [] for name in [*INDEX_SCHEMA.names[1:], "picture_digest"]}
    with published(path) as file:
        for sample in samples:
            for name, value in _index_row(sample, _add_sample(file, sample)).items():
                columns[name].append(value)
        end_tar(file)
    count = len(columns["key"])
    if not count:
        path.unlink()
        return WrittenShard("", 0, 0, columns)
    return WrittenShard(file.sha256, file.size, count, columns)


def _add_sample(file: HashingFile, sample: Sample) -> dict[str, tuple[int, int]]:
    """Payload offset and size of each field."""
    assert "." not in sample.key, f"key {sample.key!r}: readers cut keys at the first dot"
    fields = to_fields(sample).items()
    return {name: (add_member(file, f"{sample.key}.{name}", data), len(data)) for name, data in fields}


def _index_row(sample: Sample, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    image = places.get(sample.image_format or "", (0, 0))
    return {
        "key": sample.key,
        "tokens_offset": places[TOKENS][0],
        "tokens_bytes": places[TOKENS][1],
        "meta_offset": places[META][0],
        "meta_bytes": places[META][1],
        "image_offset": image[0],
        "image_bytes": image[1],
        "num_text_tokens": len(sample.tokens),
        "num_supervised_tokens": sample.num_supervised_tokens,
        "has_image": sample.image is not None,
        "source": sample.source,
        "id": sample.id,
        "picture_digest": _picture_digest(sample.image) if sample.image is not None else None,
    }


@functools.lru_cache(maxsize=8)  # few, for originals may be large: rows that share a picture come with the same bytes
def _picture_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:16]


def read_fields(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields of each sample, as the stock webdataset package reads them."""
    from webdataset import tariterators  # here, because it imports torch

    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        for sample in tariterators.group_by_keys(files):
            yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}


# -- The manifest and the index ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardEntry:
    """One tar of the set."""

    name: str
    sha256: str
    bytes: int
    samples: int


@dataclass(frozen=True)
class Manifest:
    """What a shard set is. The sha256 of the file's bytes, kept in `sha256`, identifies the set.

    made_with   how many shards each set of packages made
    sidecars    their sha256 by file name; those of ranges that left no sample, and so no tar, too
    """

    model: str
    template: str
    tokenizer: dict[str, Any]
    image: dict[str, Any]
    max_text_tokens: int
    spec_sha256: str
    made_with: dict[str, int]
    counts: dict[str, int]
    sources: dict[str, dict[str, int]]
    rejects_by_reason: dict[str, int]
    shards: tuple[ShardEntry, ...]
    sidecars: dict[str, str]
    index: dict[str, Any]
    rejects: dict[str, Any]
    sha256: str = ""

    def to_bytes(self) -> bytes:
        table = {"format": FORMAT} | {name: value for name, value in asdict(self).items() if name != "sha256"}
        return canonical_json(table | {"seal": _seal(table)})

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Raises: UserError if the folder is no shard set."""
        path = Path(folder) / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_no_manifest(Path(folder))) from None
        try:
            table = json.loads(data)
            seal = table.pop("seal")
            if table["format"] != FORMAT:
                raise UserError(f"{path} has format {table['format']}, expected {FORMAT}; build the set again")
            if seal != _seal(table):
                raise ValueError("its seal does not fit")
            del table["format"]
            shards = tuple(ShardEntry(**entry) for entry in table.pop("shards"))
            return cls(**table, shards=shards, sha256=hashlib.sha256(data).hexdigest())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({error}); run preprocess/build_shards.py again") from None


def _seal(table: dict[str, Any]) -> str:
    """Kept in the manifest: whatever bit of it flips, the two no longer fit."""
    return hashlib.sha256(canonical_json(table)).hexdigest()


def _no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no shard set {folder}: no such folder; build it with preprocess/build_shards.py"
    unfinished = (folder / WORK).is_dir()
    what = "an unfinished shard set" if unfinished else "no shard set"
    return f"{folder} is {what}: it has no {MANIFEST}; run preprocess/build_shards.py, to the end, with --out {folder}"


def load_index(folder: Path | str) -> pa.Table:
    """One row per sample, in the order of shards and of positions in them.

    Raises: UserError if it is missing or damaged; OSError if the disk fails.
    """
    path = Path(folder) / INDEX
    try:
        table = pq.read_table(path, schema=INDEX_SCHEMA)
        table.validate(full=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run preprocess/build_shards.py again") from None
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error.strerror}); ask its owner for the right") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged_index(path, error) from None
    except Exception as error:  # of damaged bytes pyarrow makes nearly any exception, MemoryError among them
        raise _damaged_index(path, error) from None
    return table


def _damaged_index(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({first_line(error)}); delete it and run preprocess/build_shards.py again")
