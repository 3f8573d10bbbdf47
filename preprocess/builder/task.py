"""`build_shard`, the function of a Ray task: builds one shard and its sidecar from a range of dialogues."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess import prompts
from preprocess.annotations.worklist import DialogueRange
from preprocess.atomic import canonical_json, publish, sync_folder
from preprocess.builder.sample_encoder import SampleEncoder, SampleSettings
from preprocess.images import codec
from preprocess.images.store import ImageStore
from preprocess.remote_path import AnyPath
from preprocess.shards.folder import ShardFolder
from preprocess.shards.writer import write_shard

LAST_SEEN_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything that a worker needs to build one shard.

    `spec_sha256` is a hash of the settings and the dialogues. A shard whose sidecar has the same hash can be reused.
    """

    name: str
    spec_sha256: str
    range: DialogueRange
    settings: SampleSettings
    folder: ShardFolder
    root: AnyPath
    archives: dict[str, str]

    @property
    def tar(self) -> Path:
        return self.folder.tar(self.name)

    @property
    def sidecar(self) -> Path:
        return self.folder.sidecar(self.name)

    @property
    def last_seen(self) -> Path:
        return self.folder.last_seen(self.name)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Counts of a finished shard, for the driver. `rejects` is the number of rejected rows by source."""

    name: str
    dialogues: int
    samples: int
    rejects: dict[str, int]


def build_shard(task: ShardTask) -> ShardResult:
    """Write the shard's tar, then its sidecar. Bad rows are recorded as rejects in the sidecar.

    An old sidecar is removed first, because it would not describe the new tar.

    Raises: OSError if a file cannot be read or written.
    """
    tokenizer = _load_tokenizer(str(task.folder.tokenizer), task.settings.tokenizer_sha256)
    if task.sidecar.exists():
        task.sidecar.unlink()
        sync_folder(task.sidecar.parent)
    with task.last_seen.open("wb", buffering=0) as last_seen:
        encoder = SampleEncoder(
            task.settings,
            ImageStore(task.root, task.archives),
            tokenizer,
            functools.partial(_write_last_seen, last_seen.fileno()),
        )
        written = write_shard(task.tar, encoder.samples(_read_range(task), task.range.first))
    sidecar = {
        "spec_sha256": task.spec_sha256,
        **vars(written),
        "made_with": codec.codec_versions(),
        "rejects": [rejected.to_json() for rejected in encoder.rejects],
        "rejected_pictures": encoder.rejected_images,
        "pictures_sha256": sizes_sha256(encoder.image_sizes),
    }
    publish(task.sidecar, canonical_json(sidecar, indent=None))
    task.last_seen.unlink(missing_ok=True)
    rejects = Counter(rejected.source for rejected in encoder.rejects)
    return ShardResult(name=task.name, dialogues=task.range.count, samples=written.samples, rejects=dict(rejects))


def same_images(task: ShardTask, sidecar: dict[str, Any]) -> bool:
    """Return whether every image in the shard still has the file size that it had when the shard was built."""
    store = ImageStore(task.root, task.archives)
    rejected = {(entry["source"], entry["row"]) for entry in sidecar["rejects"]}
    images = {one["picture"] for one in _read_range(task) if (one["source"], one["row"]) not in rejected} - {None}
    return sizes_sha256({image: store.size(image) for image in images}) == sidecar["pictures_sha256"]


def sizes_sha256(sizes: Mapping[str, int | None]) -> str:
    return hashlib.sha256(canonical_json(sizes)).hexdigest()


def _read_range(task: ShardTask) -> Iterator[dict[str, Any]]:
    """Return the task's dialogues. Raises: OSError if this node does not read the bytes that the driver wrote."""
    path, part = task.folder.dialogues, task.range
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(handle, part.size, part.offset)
    finally:
        os.close(handle)
    if len(data) != part.size:
        raise OSError(f"{path}: read {len(data)} of {part.size} bytes at offset {part.offset}")
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise OSError(
            f"{path}: the {part.size} bytes at offset {part.offset} differ from the bytes that were written; "
            "is the file system's cache stale?"
        )
    return (json.loads(line) for line in data.splitlines())


def _write_last_seen(file: int, dialogue: dict[str, Any]) -> None:
    place = f"row {dialogue['row']} of {dialogue['source']}, image {dialogue['picture']}"
    os.pwrite(file, place.encode()[:LAST_SEEN_BYTES].ljust(LAST_SEEN_BYTES), 0)


def read_last_seen(task: ShardTask) -> str:
    """Describe the row that a task was working on when its process died."""
    try:
        return task.last_seen.read_text(errors="replace").strip() or "its first row"
    except OSError:
        return "no row yet"


@functools.lru_cache(maxsize=2)
def _load_tokenizer(path: str, sha256: str) -> prompts.Tokenizer:
    tokenizer = prompts.load_tokenizer(path)
    assert tokenizer.sha256 == sha256, f"{path} changed while shards were built"
    return tokenizer
