"""Writing and reading the tar of a shard, and the index rows of its samples."""

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


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """Hash and size of a shard's tar, and the index columns of its samples."""

    sha256: str
    bytes: int
    samples: int
    columns: dict[str, list[Any]]


def write_shard(path: Path, samples: Iterable[Sample]) -> WrittenShard:
    """Write the samples to a tar. Equal samples give equal bytes. If there are no samples, there is no tar."""
    columns: dict[str, list[Any]] = {name: [] for name in [*INDEX_SCHEMA.names[1:], "picture_digest"]}
    with published(path) as file:
        for sample in samples:
            for name, value in _index_row(sample, _add_sample(file, sample)).items():
                columns[name].append(value)
        end_tar(file)
    count = len(columns["key"])
    if not count:
        path.unlink()
        return WrittenShard(sha256="", bytes=0, samples=0, columns=columns)
    return WrittenShard(sha256=file.sha256, bytes=file.size, samples=count, columns=columns)


def _add_sample(file: HashingFile, sample: Sample) -> dict[str, tuple[int, int]]:
    """Write a sample's fields to the tar. Return the offset and size of each field's content."""
    assert "." not in sample.key, f"key {sample.key!r} has a dot, but readers cut keys at the first dot"
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
        "picture_digest": _image_digest(sample.image) if sample.image is not None else None,
    }


@functools.lru_cache(maxsize=8)  # neighbouring rows share images; only a few, because original files may be large
def _image_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:16]


def read_fields(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the fields of each sample, read with the webdataset package."""
    from webdataset import tariterators  # imported here, because it imports torch, which builds do not need

    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        for sample in tariterators.group_by_keys(files):
            yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}
