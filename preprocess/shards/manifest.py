"""The manifest and the index of a shard set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError, first_line
from preprocess.atomic import canonical_json

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
