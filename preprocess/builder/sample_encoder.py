"""`SampleEncoder`: turns dialogues of the worklist into samples or rejects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess import prompts
from preprocess.images import codec
from preprocess.images.cache import ImageCache
from preprocess.images.store import ImageStore, sha256_hex
from preprocess.rejects import Reject, Rejected
from preprocess.shards.sample import Sample

TEXTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that decide a sample's bytes. Their names and values are hashed into each shard's `spec_sha256`."""

    template: str
    tokenizer_sha256: str
    image_px: int
    encoding: str
    max_text_tokens: int


class SampleEncoder:
    """Encodes dialogues, and records the rows and images that it rejects.

    Attributes:
        rejects: rejected rows.
        rejected_images: sha256 of each rejected image file by path, or the reject reason if it could not be read.
        image_sizes: size in bytes of each accepted image file, by path.
    """

    def __init__(
        self,
        settings: SampleSettings,
        store: ImageStore,
        tokenizer: prompts.Tokenizer,
        note_last_seen: Callable[[dict[str, Any]], None],
    ) -> None:
        self.settings, self.store, self.tokenizer = settings, store, tokenizer
        self.rejects: list[Reject] = []
        self.rejected_images: dict[str, str] = {}
        self.image_sizes: dict[str, int] = {}
        self._cache = ImageCache()
        self._note_last_seen = note_last_seen

    def samples(self, dialogues: Iterator[dict[str, Any]], first: int) -> Iterator[Sample]:
        """Yield the samples of the dialogues. Their keys are consecutive numbers that start with `first`."""
        for number, (dialogue, encoded) in enumerate(self._with_texts_encoded(dialogues), first):
            self._note_last_seen(dialogue)
            try:
                yield self._sample(f"{number:09d}", dialogue, encoded)
            except Rejected as error:
                origin = {key: dialogue[key] for key in ("source", "row", "id")}
                self.rejects.append(Reject.from_error(error, **origin))

    def _with_texts_encoded(
        self, dialogues: Iterator[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], prompts.EncodedDialogue]]:
        """Encode the texts of several dialogues before any of their images.

        This is faster, because decoding an image evicts the tokenizer's data from the processor's cache.
        """
        while block := list(itertools.islice(dialogues, TEXTS_AT_ONCE)):
            yield from zip(block, [self._encode_text(dialogue) for dialogue in block], strict=True)

    def _encode_text(self, dialogue: dict[str, Any]) -> prompts.EncodedDialogue:
        self._note_last_seen(dialogue)
        template, limit = self.settings.template, self.settings.max_text_tokens
        return prompts.encode_dialogue(dialogue["conversations"], template, self.tokenizer, limit)

    def _sample(self, key: str, dialogue: dict[str, Any], encoded: prompts.EncodedDialogue) -> Sample:
        if not encoded.spans:
            limit = self.settings.max_text_tokens
            raise Rejected("no_supervised_token", f"no answer begins within {limit} tokens")
        path = dialogue["picture"]
        image, image_format = self._encode_image(path) if path is not None else (None, None)
        return Sample(
            key=key,
            tokens=np.asarray(encoded.tokens, dtype=np.uint16),
            spans=encoded.spans,
            image=image,
            image_format=image_format,
            source=dialogue["source"],
            id=dialogue["id"],
            row=dialogue["row"],
            image_path=path,
        )

    def _encode_image(self, path: str) -> tuple[bytes, str]:
        """Return the bytes of an image as a shard stores them, and their format. Raises: Rejected."""
        if stored := self._cache.get(path):
            return stored
        data = None
        try:
            data = self.store.read(path)
            stored = codec.encode_stored_image(data, self.settings.image_px, self.settings.encoding)
        except Rejected as error:
            self.rejected_images[path] = error.reason if data is None else sha256_hex(data)
            detail = f"{path}: {error.detail}" if error.detail else path
            self._cache.add_rejection(path, error.reason, detail)
            raise Rejected(error.reason, detail) from None
        self.image_sizes[path] = len(data)
        self._cache.add(path, stored)
        return stored
