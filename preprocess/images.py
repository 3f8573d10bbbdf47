"""A file's bytes become the picture that the model sees: RGB, squashed to a square. Written rules for every dirt.

colours         greyscale is repeated; palette, CMYK and others are converted; embedded colour profiles are ignored
transparency    is laid on white, as a page would show it
16 bits         are divided by 257; wider or floating-point pixels are refused
animations      give their first frame
orientation     that EXIF asks for is applied
size            every picture is squashed, bicubic and antialiased; the aspect ratio is not kept
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from model.errors import UserError
from preprocess.rejects import REASONS, Rejected

MAX_PIXELS = 64_000_000  # at four bytes each, still small beside a worker's memory
JPEG_QUALITY = 95

Image.MAX_IMAGE_PIXELS = None  # the limit above is checked instead, before any pixel is decoded

Kind = Literal["jpg", "png", "gif", "webp", "bmp", "tiff"]
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}
_TRUNCATED = ("truncated", "premature end", "not enough image data", "unexpected end")
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory: no two runs have the same
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def sniff(data: bytes) -> Kind:
    """The format by its magic bytes; names lie. Raises: Rejected."""
    if not data:
        raise Rejected("picture_empty")
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM":
        return "bmp"
    if data[:4] in (b"II*\x00", b"MM\x00*"):
        return "tiff"
    raise Rejected("picture_unknown_format", f"starts with {data[:8]!r}")


def decode_rgb(data: bytes) -> Image.Image:
    """Raises: Rejected."""
    kind = sniff(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it reads well
            with Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[kind]]) as picture:
                _guard_size(picture)
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                return _to_rgb(picture)
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # what decoders raise for broken bytes has no common class
        said = _ADDRESS.sub("", str(error))
        reason = "picture_truncated" if any(sign in said.lower() for sign in _TRUNCATED) else "picture_corrupt"
        raise Rejected(reason, f"{kind}: {said}") from None


def _guard_size(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise Rejected("picture_too_large", f"{width}×{height} pixels, at most {MAX_PIXELS} are decoded")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in _SIXTEEN_BITS or picture.mode == "I":
        picture = _eight_bits(picture)
    if picture.mode == "F":
        raise Rejected("picture_unsupported_pixels", "floating-point pixels")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_white(picture.convert("RGBA"))
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Rejected("picture_unsupported_pixels", f"values from {values.min()} to {values.max()}")
    return Image.fromarray((values.astype(np.uint16) // 257).astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return page


def squash(picture: Image.Image, image_px: int) -> Image.Image:
    return picture.resize((image_px, image_px), Image.Resampling.BICUBIC)


def encode_jpeg(picture: Image.Image) -> bytes:
    """Without chroma subsampling: patches are small, and colours are asked about."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_raw(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(picture, dtype=np.uint8), allow_pickle=False)
    return buffer.getvalue()


def stored_picture(data: bytes, image_px: int, encoding: str) -> tuple[bytes, str]:
    """What a shard keeps of a picture file, and the name of its format. Raises: Rejected."""
    picture = decode_rgb(data)
    if encoding == "original":
        return data, sniff(data)
    if encoding == "raw":
        return encode_raw(squash(picture, image_px)), "pixels.npy"
    return encode_jpeg(squash(picture, image_px)), "jpg"


def read_pixels(path: Path, image_px: int) -> np.ndarray:
    """uint8 [h, w, 3] of a picture file, as a model that was trained on a set of JPEGs saw its own.

    Raises: UserError if the file is no picture.
    """
    try:
        return stored_pixels(stored_picture(path.read_bytes(), image_px, "jpeg")[0])
    except OSError as error:
        raise UserError(f"picture {path} cannot be read: {error.strerror}") from None
    except Rejected as error:
        raise UserError(f"picture {path} cannot be used: {REASONS[error.reason]} ({error.detail})") from None


def stored_pixels(data: bytes, image_px: int | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of what `stored_picture` returned; originals need `image_px`, to be squashed."""
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False)
    picture = decode_rgb(data)
    if image_px is not None and picture.size != (image_px, image_px):
        picture = squash(picture, image_px)
    return np.asarray(picture)
