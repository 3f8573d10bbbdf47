"""A file's bytes become the picture that the model sees: RGB, squashed to a square. Written rules for every dirt.

colours         greyscale is repeated; palette, CMYK and others are converted; embedded colour profiles are ignored
transparency    is laid on white, as a page would show it
16 bits         are divided by 257; wider or floating-point pixels are refused
animations      give their first frame
orientation     that EXIF, or XMP in its place, asks for is applied
size            every picture is squashed, bicubic and antialiased; the aspect ratio is not kept

Plain JPEGs are decoded by simplejpeg where it is installed: the same pixels as Pillow's, in less time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from model.errors import UserError
from preprocess.rejects import REASONS, Rejected

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 64_000_000
MAX_WORKER_PIXELS = 25_000_000  # so that a worker stays below 1 GiB
WEBP_FACTOR = 4 / 3  # more memory per pixel than other formats take
STRIP_PIXELS = 1 << 20
JPEG_QUALITY = 95

Image.MAX_IMAGE_PIXELS = None  # the limit above is checked instead, before any pixel is decoded

Pixels = npt.NDArray[np.uint8]
ImageFormat = Literal["jpg", "png", "gif", "webp", "bmp", "tiff"]
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}
_TRUNCATED = ("truncated", "premature end", "not enough image data", "unexpected end")
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory: no two runs have the same
_TURNS = (b"Exif\0", b"tiff:Orientation")  # what may ask for one, the latter in an XMP packet
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def detect_format(data: bytes) -> ImageFormat:
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


def decode_rgb(data: bytes, most: int = MAX_PIXELS) -> Pixels:
    """[h, w, 3], of at most so many pixels. Raises: Rejected."""
    kind = detect_format(data)
    if kind == "jpg" and (pixels := _plain_jpeg(data, most)) is not None:
        return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it reads well
            with Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[kind]]) as picture:
                _guard_size(picture, int(most / WEBP_FACTOR) if kind == "webp" else most)
                return _by_pillow(picture)
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # what decoders raise for broken bytes has no common class
        said = _ADDRESS.sub("", str(error))
        reason = "picture_truncated" if any(sign in said.lower() for sign in _TRUNCATED) else "picture_corrupt"
        raise Rejected(reason, f"{kind}: {said}") from None


def _plain_jpeg(data: bytes, most: int) -> Pixels | None:
    """None for all that is odd in the least: Pillow takes it, and says what is wrong with it."""
    if simplejpeg is None or any(sign in data for sign in _TURNS):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or height * width > most:
            return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except MemoryError:
        raise
    except Exception:  # a KeyError for samplings that it has no name for, and who knows what else
        return None


def _by_pillow(picture: Image.Image) -> Pixels:
    """Strip by strip: conversions of a whole picture would hold it several times over."""
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    width, height = picture.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_to_rgb(strip))
    return pixels


def _guard_size(picture: Image.Image, most: int) -> None:
    width, height = picture.size
    if width * height > most:
        raise Rejected("picture_too_large", f"{width}×{height} pixels, at most {most} are decoded")


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
    levels = (values.astype(np.uint16) // 257).astype(np.uint8)
    if isinstance(transparent := picture.info.get("transparency"), int):
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _on_white(picture: Image.Image) -> Image.Image:
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return page


def encode_jpeg(pixels: Pixels) -> bytes:
    """Without chroma subsampling: patches are small, and colours are asked about."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_raw(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels, allow_pickle=False)
    return buffer.getvalue()


@functools.cache
def codec_versions() -> str:
    """The packages that decide a stored picture's bytes: others may differ by a level here and there."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "torch"))


def encode_stored_image(data: bytes, image_px: int, encoding: str) -> tuple[bytes, str]:
    """What a shard keeps of a picture file, and the name of its format. Raises: Rejected."""
    pixels = decode_rgb(data, MAX_WORKER_PIXELS)
    if encoding == "original":
        return data, detect_format(data)
    if encoding == "raw":
        return encode_raw(resize_to_square(pixels, image_px)), "pixels.npy"
    return encode_jpeg(resize_to_square(pixels, image_px)), "jpg"


def read_image_file(path: Path, image_px: int) -> Pixels:
    """uint8 [h, w, 3] of a picture file, as a model that was trained on a set of JPEGs saw its own.

    Raises: UserError if the file is no picture.
    """
    try:
        return decode_rgb(encode_jpeg(resize_to_square(decode_rgb(path.read_bytes()), image_px)))
    except OSError as error:
        raise UserError(f"picture {path} cannot be read: {error.strerror}") from None
    except Rejected as error:
        raise UserError(f"picture {path} cannot be used: {REASONS[error.reason]} ({error.detail})") from None


def decode_stored_image(data: bytes, image_px: int | None = None) -> Pixels:
    """uint8 [h, w, 3] of what `encode_stored_image` returned; originals need `image_px`, to be squashed."""
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False)
    pixels = decode_rgb(data)
    return pixels if image_px is None else resize_to_square(pixels, image_px)


def resize_to_square(pixels: Pixels, image_px: int) -> Pixels:
    """[h, w, 3] -> [image_px, image_px, 3]; the aspect ratio is not kept."""
    import torch  # here: half a gigabyte that only those who make pictures need
    from torch.nn.functional import interpolate

    height, width, _ = pixels.shape
    if height == width == image_px:
        return pixels
    picture = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)  # [1, 3, h, w]
    if _columns_first(height, width, image_px):
        picture = interpolate(picture, (image_px, width), mode="bicubic", antialias=True)
    picture = interpolate(picture, (image_px, image_px), mode="bicubic", antialias=True)
    return picture[0].permute(1, 2, 0).contiguous().numpy()


def _columns_first(height: int, width: int, image_px: int) -> bool:
    """Whether Pillow 13 filters columns before rows. Levels are rounded and clipped in between, so the order shows."""
    return height > image_px and height - image_px > 2 * (width - image_px)
