"""A sample <-> its tar fields: the contract that shards are written and read by.

KEY.tokens.npy      uint16 token ids, at most the model's limit of text
KEY.json            where it came from, and the spans of tokens that are supervised
KEY.jpg             the picture, absent for text-only samples (`raw`: KEY.pixels.npy; `original`: by its format)
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from preprocess.images import codec

TOKENS, META = "tokens.npy", "json"
NPY_PREAMBLE = 10  # bytes of an array's file before its header, whose length the last two of them are


@dataclass(frozen=True)
class Sample:
    """One training row. Keys have no dots: readers cut them at the first one.

    tokens          uint16 [t]
    spans           [start, end) ranges of supervised tokens, in order, not overlapping
    image_format    the field's name: "jpg", "pixels.npy" or, for originals, what the file is
    row, picture    where it came from: the row of its annotation file, and the picture's path under the root
    """

    key: str
    tokens: np.ndarray
    spans: list[tuple[int, int]]
    image: bytes | None
    image_format: str | None
    source: str
    id: str
    row: int = -1
    picture: str | None = None

    @property
    def num_supervised_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


def to_fields(sample: Sample) -> dict[str, bytes]:
    """The same sample gives the same bytes."""
    tokens = np.ascontiguousarray(sample.tokens, dtype="<u2")
    meta = {
        "id": sample.id,
        "picture": sample.picture,
        "row": sample.row,
        "source": sample.source,
        "spans": sample.spans,
    }
    fields = {
        META: json.dumps(meta, separators=(",", ":")).encode(),
        TOKENS: _npy_header(len(tokens)) + tokens.tobytes(),
    }
    if sample.image is not None:
        assert sample.image_format
        fields[sample.image_format] = sample.image
    return fields


@functools.lru_cache(maxsize=4096)
def _npy_header(count: int) -> bytes:
    """Of so many token ids, as `np.save` writes it; it takes longer than they do."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def _token_ids(data: bytes) -> npt.NDArray[np.uint16]:
    """As `np.load` reads them; it would parse the header as Python each time. Raises: ValueError."""
    size = NPY_PREAMBLE + int.from_bytes(data[NPY_PREAMBLE - 2 : NPY_PREAMBLE], "little")
    if data[:size] != _npy_header((len(data) - size) // 2):
        return np.load(io.BytesIO(data), allow_pickle=False)  # others' or damaged: it says which
    return np.frombuffer(data, "<u2", offset=size)


def from_fields(fields: Mapping[str, bytes], key: str = "") -> Sample:
    """Reads what `to_fields` wrote; `__…__` entries, which stock readers add, are not fields."""
    pictures = [name for name in fields if name not in (TOKENS, META) and not name.startswith("__")]
    assert len(pictures) <= 1, f"{key}: more than one picture: {pictures}"
    name = pictures[0] if pictures else None
    return from_payloads(key, fields[TOKENS], fields[META], fields[name] if name else None, name)


def from_payloads(key: str, tokens: bytes, meta: bytes, image: bytes | None, image_format: str | None = None) -> Sample:
    """For readers that take payloads from the index: it does not tell the picture's format, and none is needed."""
    about = json.loads(meta)
    spans = [(start, end) for start, end in about["spans"]]
    return Sample(
        key,
        _token_ids(tokens),
        spans,
        image,
        image_format,
        about["source"],
        about["id"],
        about["row"],
        about["picture"],
    )


def sample_pixels(sample: Sample, image_px: int | None = None) -> np.ndarray:
    """uint8 [h, w, 3] at the model's size; a set of originals needs `image_px`, and they are squashed here."""
    assert sample.image is not None, f"{sample.key} is text-only"
    return codec.decode_stored_image(sample.image, image_px)
