"""Write one shard: a deterministic tar, published atomically, and the index rows of its samples."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.atomic import HashingFile, published
from preprocess.shards.manifest import INDEX_SCHEMA
from preprocess.shards.sample import META, TOKENS, Sample, to_fields
from preprocess.shards.tar_writer import add_member, end_tar


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
