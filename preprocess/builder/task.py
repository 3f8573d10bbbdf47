"""The work of one Ray task: a range of dialogues becomes one shard and its sidecar. Needs nothing but its argument."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import prompts
from preprocess.annotations.worklist import DialogueRange
from preprocess.atomic import canonical_json, publish, sync_folder
from preprocess.images import codec
from preprocess.images.cache import ImageCache
from preprocess.images.store import ImageStore, sha256_hex
from preprocess.rejects import Reject, Rejected
from preprocess.remote_path import AnyPath
from preprocess.shards.sample import Sample
from preprocess.shards.writer import write_shard

CRUMB_BYTES = 512
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Settings:
    """What decides a sample's bytes besides its row and its picture. The pictures' place is not among it."""

    template: str
    tokenizer_sha256: str
    image_px: int
    encoding: str
    max_text_tokens: int


@dataclass(frozen=True)
class ShardTask:
    """`spec_sha256` stands for the settings and the range: a shard whose sidecar has it need not be built."""

    name: str
    spec_sha256: str
    range: DialogueRange
    settings: Settings
    dialogues: Path
    tokenizer: Path
    root: AnyPath
    archives: dict[str, str]

    @property
    def tar(self) -> Path:
        return self.dialogues.parent.parent / f"{self.name}.tar"

    @property
    def sidecar(self) -> Path:
        return self.tar.with_suffix(".json")

    @property
    def crumb(self) -> Path:
        """Which dialogue is being worked on: what is left of a process that a picture made crash."""
        return self.dialogues.with_name(f"{self.name}.crumb.tmp")


@dataclass(frozen=True)
class Done:
    """What the driver hears of a finished shard."""

    name: str
    dialogues: int
    samples: int
    rejects: dict[str, int]


def build_shard(task: ShardTask) -> Done:
    """Publishes the shard, then its sidecar; an old one is never beside it.

    Raises: OSError if reading or writing failed; bad rows never raise.
    """
    store = ImageStore(task.root, task.archives)
    maker = _SampleMaker(task.settings, store, _tokenizer(str(task.tokenizer), task.settings.tokenizer_sha256))
    if task.sidecar.exists():
        task.sidecar.unlink()
        sync_folder(task.sidecar.parent)
    with task.crumb.open("wb", buffering=0) as crumb:
        rows = _read_range(task.dialogues, task.range)
        written = write_shard(task.tar, maker.samples(rows, task.range.first, crumb.fileno()))
    sidecar = {
        "spec_sha256": task.spec_sha256,
        **vars(written),
        "made_with": codec.codec_versions(),
        "rejects": [rejected.to_json() for rejected in maker.rejects],
        "rejected_pictures": maker.rejected_pictures,
        "pictures_sha256": sizes_sha256(maker.sizes),
    }
    publish(task.sidecar, canonical_json(sidecar, indent=None))
    task.crumb.unlink(missing_ok=True)
    rejects = Counter(rejected.source for rejected in maker.rejects)
    return Done(task.name, task.range.count, written.samples, dict(rejects))


def same_pictures(task: ShardTask, sidecar: dict[str, Any]) -> bool:
    """Whether every picture in the shard is as large as when it was built. Asks the file system for each."""
    store = ImageStore(task.root, task.archives)
    rejected = {(entry["source"], entry["row"]) for entry in sidecar["rejects"]}
    dialogues = _read_range(task.dialogues, task.range)
    pictures = {one["picture"] for one in dialogues if (one["source"], one["row"]) not in rejected} - {None}
    return sizes_sha256({picture: store.size(picture) for picture in pictures}) == sidecar["pictures_sha256"]


def sizes_sha256(sizes: Mapping[str, int | None]) -> str:
    return hashlib.sha256(canonical_json(sizes)).hexdigest()


def _read_range(path: Path, part: DialogueRange) -> Iterator[dict[str, Any]]:
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(handle, part.size, part.offset)
    finally:
        os.close(handle)
    if len(data) != part.size:
        raise OSError(f"{path}: read {len(data)} of {part.size} bytes at {part.offset}")
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise OSError(f"{path}: the {part.size} bytes at {part.offset} are not those that were written; a stale cache?")
    return (json.loads(line) for line in data.splitlines())


def _record_last_seen(crumb: int, dialogue: dict[str, Any]) -> None:
    place = f"row {dialogue['row']} of {dialogue['source']}, picture {dialogue['picture']}"
    os.pwrite(crumb, place.encode()[:CRUMB_BYTES].ljust(CRUMB_BYTES), 0)


def read_last_seen(task: ShardTask) -> str:
    try:
        return task.crumb.read_text(errors="replace").strip() or "its first row"
    except OSError:
        return "no row yet"


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str, sha256: str) -> prompts.Tokenizer:
    tokenizer = prompts.load_tokenizer(path)
    assert tokenizer.sha256 == sha256, f"{path} changed while shards were built"
    return tokenizer


class _SampleMaker:
    """Dialogues -> samples, keeping account of those that are rejected."""

    def __init__(self, settings: Settings, store: ImageStore, tokenizer: prompts.Tokenizer) -> None:
        self.settings, self.store, self.tokenizer = settings, store, tokenizer
        self.rejects: list[Reject] = []
        self.rejected_pictures: dict[str, str] = {}  # stamps of what was read, not of what may have come since
        self.sizes: dict[str, int] = {}
        self.recent = ImageCache()

    def samples(self, dialogues: Iterator[dict[str, Any]], first: int, crumb: int) -> Iterator[Sample]:
        for number, (dialogue, encoded) in enumerate(self._encoded(dialogues, crumb), first):
            _record_last_seen(crumb, dialogue)
            try:
                yield self._sample(f"{number:09d}", dialogue, encoded)
            except Rejected as error:
                origin = {key: dialogue[key] for key in ("source", "row", "id")}
                self.rejects.append(Reject.from_error(error, **origin))

    def _encoded(
        self, dialogues: Iterator[dict[str, Any]], crumb: int
    ) -> Iterator[tuple[dict[str, Any], prompts.EncodedDialogue]]:
        """Several texts, then their pictures: each of these drives the tokenizer out of the processor's cache."""
        while block := list(itertools.islice(dialogues, TEXTS_AT_ONCE)):
            yield from zip(block, [self._encode(dialogue, crumb) for dialogue in block], strict=True)

    def _encode(self, dialogue: dict[str, Any], crumb: int) -> prompts.EncodedDialogue:
        _record_last_seen(crumb, dialogue)
        template, most = self.settings.template, self.settings.max_text_tokens
        return prompts.encode_dialogue(dialogue["conversations"], template, self.tokenizer, most)

    def _sample(self, key: str, dialogue: dict[str, Any], encoded: prompts.EncodedDialogue) -> Sample:
        if not encoded.spans:
            most = self.settings.max_text_tokens
            raise Rejected("no_supervised_token", f"no answer begins within {most} tokens")
        picture = dialogue["picture"]
        image, image_format = self._picture(picture) if picture is not None else (None, None)
        return Sample(
            key=key,
            tokens=np.asarray(encoded.tokens, dtype=np.uint16),
            spans=encoded.spans,
            image=image,
            image_format=image_format,
            source=dialogue["source"],
            id=dialogue["id"],
            row=dialogue["row"],
            picture=picture,
        )

    def _picture(self, path: str) -> tuple[bytes, str]:
        if stored := self.recent.get(path):
            return stored
        data = None
        try:
            data = self.store.read(path)
            stored = codec.encode_stored_image(data, self.settings.image_px, self.settings.encoding)
        except Rejected as error:
            self.rejected_pictures[path] = error.reason if data is None else sha256_hex(data)
            detail = f"{path}: {error.detail}" if error.detail else path
            self.recent.add_rejection(path, error.reason, detail)
            raise Rejected(error.reason, detail) from None
        self.sizes[path] = len(data)
        self.recent.add(path, stored)
        return stored
