"""`Manifest` and index of a shard set: their formats, and loading them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError, first_line
from preprocess.atomic import canonical_json
from preprocess.shards.folder import MANIFEST, ShardFolder

FORMAT = 2

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


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of the set, as the manifest lists it. `name` is the file name."""

    name: str
    sha256: str
    bytes: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a shard set. It is written last, so a folder without a manifest is not a complete set.

    Attributes:
        made_with: number of shards by the package versions that built them.
        sidecars: sha256 of each sidecar by file name. Shards without samples have a sidecar but no tar.
        sha256: hash of the manifest file, which identifies the set. It is not stored in the file.
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
        return canonical_json(table | {"seal": _checksum(table)})

    @classmethod
    def load(cls, folder: PathLike[str] | str) -> Manifest:
        """Load the manifest of a shard set. Raises: UserError if it is missing or damaged."""
        path = ShardFolder(Path(folder)).manifest
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_explain_missing_manifest(ShardFolder(Path(folder)))) from None
        try:
            table = json.loads(data)
            seal = table.pop("seal")
            if table["format"] != FORMAT:
                raise UserError(f"{path} has format {table['format']}, expected {FORMAT}; build the set again")
            if seal != _checksum(table):
                raise ValueError("its checksum does not match")
            del table["format"]
            shards = tuple(ShardEntry(**entry) for entry in table.pop("shards"))
            return cls(**table, shards=shards, sha256=hashlib.sha256(data).hexdigest())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({error}); run preprocess/build_shards.py again") from None


def _checksum(table: dict[str, Any]) -> str:
    """Hash all fields of a manifest except `seal`, the field that stores this hash.

    `Manifest.load` compares the hash with `seal` to detect a damaged manifest.
    """
    return hashlib.sha256(canonical_json(table)).hexdigest()


def _explain_missing_manifest(folder: ShardFolder) -> str:
    if not folder.path.is_dir():
        return f"there is no shard set {folder}: no such folder; build it with preprocess/build_shards.py"
    what = "an unfinished shard set" if folder.work.is_dir() else "not a shard set"
    return f"{folder} is {what}: it has no {MANIFEST}; run preprocess/build_shards.py with --out {folder} until it ends"


def load_index(folder: PathLike[str] | str) -> pa.Table:
    """Load the index. It has one row per sample, ordered by shard and by position in the shard.

    Raises: UserError if the index is missing or damaged; OSError if the disk fails.
    """
    path = ShardFolder(Path(folder)).index
    try:
        with path.open("rb") as file:  # because pyarrow cannot open a path that is not UTF-8
            table = pq.read_table(file, schema=INDEX_SCHEMA)
        table.validate(full=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run preprocess/build_shards.py again") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); ask its owner for permission") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged_index(path, error) from None
    except Exception as error:  # pyarrow raises almost any exception for damaged bytes, even MemoryError
        raise _damaged_index(path, error) from None
    return table


def _damaged_index(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({first_line(error)}); delete it and run preprocess/build_shards.py again")
