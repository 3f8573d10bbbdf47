"""`Sample` and its encoding as the files of a WebDataset tar.

KEY.tokens.npy      uint16 token ids, at most the model's limit of text tokens
KEY.json            origin of the sample, and the spans of supervised tokens
KEY.jpg             the image, absent for text-only samples (encoding `raw`: KEY.pixels.npy; `original`: by its format)
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
NPY_PREAMBLE = 10  # magic bytes, version, and (last two bytes) length of the header of an .npy file


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample. The key must not contain a dot, because readers cut file names at the first dot.

    Attributes:
        tokens: uint16 [t].
        spans: [start, end) ranges of supervised tokens, in order, not overlapping.
        image: stored bytes of the image, None for a text-only sample.
        image_format: name of the image's field: "jpg", "pixels.npy", or the file extension of an original.
        row: number of the source's row that the sample was built from.
        image_path: path of the image file below the root of the raw data.
    """

    key: str
    tokens: np.ndarray
    spans: list[tuple[int, int]]
    image: bytes | None
    image_format: str | None
    source: str
    id: str
    row: int
    image_path: str | None

    @property
    def num_supervised_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


def to_fields(sample: Sample) -> dict[str, bytes]:
    """Encode a sample as the content of each field, by field name. Equal samples give equal bytes."""
    tokens = np.ascontiguousarray(sample.tokens, dtype="<u2")
    meta = {
        "id": sample.id,
        "picture": sample.image_path,
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
    """Return the header that `np.save` writes for `count` token ids. Cached, because NumPy takes long to write it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def _load_tokens(data: bytes) -> npt.NDArray[np.uint16]:
    """Load token ids from an .npy file. Raises: ValueError if it is damaged.

    This is faster than `np.load`, which parses the header as Python source.
    """
    size = NPY_PREAMBLE + int.from_bytes(data[NPY_PREAMBLE - 2 : NPY_PREAMBLE], "little")
    if data[:size] != _npy_header((len(data) - size) // 2):
        return np.load(io.BytesIO(data), allow_pickle=False)  # raises if the file is damaged
    return np.frombuffer(data, "<u2", offset=size)


def from_fields(fields: Mapping[str, bytes], key: str = "") -> Sample:
    """Decode fields that `to_fields` encoded. Names like `__key__`, which webdataset's readers add, are ignored."""
    images = [name for name in fields if name not in (TOKENS, META) and not name.startswith("__")]
    assert len(images) <= 1, f"{key}: more than one image: {images}"
    name = images[0] if images else None
    image = fields[name] if name else None
    return from_payloads(key, tokens=fields[TOKENS], meta=fields[META], image=image, image_format=name)


def from_payloads(
    key: str, *, tokens: bytes, meta: bytes, image: bytes | None, image_format: str | None = None
) -> Sample:
    """Decode a sample from the content of its fields.

    Callers that read through the index omit `image_format`, because the index does not contain it.
    """
    about = json.loads(meta)
    return Sample(
        key=key,
        tokens=_load_tokens(tokens),
        spans=[(start, end) for start, end in about["spans"]],
        image=image,
        image_format=image_format,
        source=about["source"],
        id=about["id"],
        row=about["row"],
        image_path=about["picture"],
    )


def sample_pixels(sample: Sample, image_px: int | None = None) -> np.ndarray:
    """Decode a sample's image to uint8 [h, w, 3]. With `image_px`, an original file is resized to this square size."""
    assert sample.image is not None, f"{sample.key} is text-only"
    return codec.decode_stored_image(sample.image, image_px)
