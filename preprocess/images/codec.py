"""Image codec: decode image files to RGB, resize them to a square, and encode them for shards.

To add an image format, add an entry to `FORMATS`. Unusual files are decoded as follows:

colours         Greyscale is repeated in all channels; palette and CMYK are converted; colour profiles are ignored.
transparency    Transparent pixels are blended with white, as a web page would show them.
16 bits         Values are divided by 257. Wider integers and floating-point pixels are rejected.
animations      The first frame is used.
orientation     The image is rotated as its EXIF data says, or its XMP data if there is no EXIF data.
metadata        All other metadata is ignored, even if it is damaged or too large for Pillow.
missing data    A JPEG is rejected if parts of its data are missing, which decoders fill with grey, or overwritten.
size            Every image is resized with bicubic antialiasing; the aspect ratio is not kept.

If simplejpeg is installed, it decodes plain JPEGs, because it is faster than Pillow and gives the same pixels. It also
reports overwritten data that Pillow does not notice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.errors import UserError
from preprocess.file_kinds import HEAD_BYTES, recognise
from preprocess.images.jpeg_structure import (
    OVERWRITTEN,
    ZEROS,
    find_damage,
    has_huffman_codes,
    with_extra_data,
    with_other_end,
    without_zeros_before_end,
)
from preprocess.images.metadata import orientation, turn_upright, without_metadata
from preprocess.images.png_structure import has_damaged_data
from preprocess.images.store import ImageStore
from preprocess.rejects import REASONS, Rejected

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """An image format that can be decoded.

    Attributes:
        magic: Pattern of the file's first bytes.
        pillow: Pillow's name of the format.
        suffixes: Suffixes of file names, in lower case.
        memory_per_pixel: Memory that decoding needs per pixel, relative to most formats.
    """

    magic: re.Pattern[bytes]
    pillow: str
    suffixes: tuple[str, ...]
    memory_per_pixel: float = 1.0


FORMATS = {
    "jpg": ImageFormat(magic=re.compile(rb"\xff\xd8\xff"), pillow="JPEG", suffixes=(".jpg", ".jpeg")),
    "png": ImageFormat(magic=re.compile(rb"\x89PNG\r\n\x1a\n"), pillow="PNG", suffixes=(".png",)),
    "gif": ImageFormat(magic=re.compile(rb"GIF8[79]a"), pillow="GIF", suffixes=(".gif",)),
    "webp": ImageFormat(
        magic=re.compile(rb"RIFF.{4}WEBP", re.DOTALL), pillow="WEBP", suffixes=(".webp",), memory_per_pixel=4 / 3
    ),
    "bmp": ImageFormat(magic=re.compile(rb"BM"), pillow="BMP", suffixes=(".bmp",)),
    "tiff": ImageFormat(magic=re.compile(rb"II\*\x00|MM\x00\*"), pillow="TIFF", suffixes=(".tif", ".tiff")),
}
IMAGE_SUFFIXES = tuple(suffix for image_format in FORMATS.values() for suffix in image_format.suffixes)

MAX_PIXELS = 64_000_000
MAX_WORKER_PIXELS = 25_000_000  # keeps a Ray worker below 1 GiB
STRIP_PIXELS = 1 << 20
JPEG_QUALITY = 95

Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked instead, before any pixel is decoded

Pixels = npt.NDArray[np.uint8]
_TRUNCATED = ("truncated", "premature end", "not enough image data", "unexpected end")
_OBJECT_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # removed from messages, because it differs from run to run
_PROGRESSIVE_FRAME = b"\xff\xc2"
_PREMATURE_END = "premature end of data segment"
# libjpeg's warnings about missing and overwritten data. Others are harmless, such as extraneous bytes before the end.
_JPEG_WARNINGS = {
    "picture_truncated": re.compile(_PREMATURE_END),
    "picture_corrupt": re.compile(
        r"bad (Huffman|arithmetic) code|found marker .* instead of RST.*|\d+ extraneous bytes before marker 0xd[0-7]"
    ),
}
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


# -- Decoding --------------------------------------------------------------------------------------------------------


def detect_format(data: bytes) -> str:
    """Return the format of an image file as a key of `FORMATS`. Raises: Rejected if the format is not supported.

    The first bytes of the file determine the format, because file names can be wrong.
    """
    if not data:
        raise Rejected("picture_empty")
    for name, image_format in FORMATS.items():
        if image_format.magic.match(data):
            return name
    kind = recognise(data[:HEAD_BYTES])
    raise Rejected("picture_unknown_format", f"{kind.name}: {kind.remedy}" if kind else f"starts with {data[:8]!r}")


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, keep_damaged: bool = False) -> Pixels:
    """Decode an image file to RGB [h, w, 3].

    Args:
        keep_damaged: Accept damage that decoders fill with grey, as builds of earlier versions did.

    Raises:
        Rejected: If the file is damaged or has more than `max_pixels`.
    """
    name = detect_format(data)
    pixels, warning = _decode_plain_jpeg(data, max_pixels) if name == "jpg" else (None, "")
    if name == "jpg" and not keep_damaged:
        pixels = _checked_jpeg(data, max_pixels, pixels, warning)
    elif pixels is None:
        pixels = _decode_with_pillow(data, name, max_pixels)
    if name == "png" and not keep_damaged and has_damaged_data(data):
        raise Rejected("picture_corrupt", "png: the checksum of its pixel data does not match")
    return turn_upright(pixels, orientation(data, name))


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> tuple[Pixels | None, str]:
    """Decode with simplejpeg. Return None, and the warning of simplejpeg, for any unusual or damaged file."""
    if simplejpeg is None:
        return None, ""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > max_pixels:
            return None, ""
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True), ""
    except MemoryError:
        raise
    except Exception as error:  # not only ValueError: an unknown chroma subsampling raises KeyError
        return None, str(error)


def _decode_with_pillow(data: bytes, name: str, max_pixels: int) -> Pixels:
    """Decode as the file stores the pixels, except for TIFFs, which Pillow turns upright. Raises: Rejected."""
    try:
        return _load_with_pillow(data, name, max_pixels)
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # decoders have no common base class for errors
        message = _OBJECT_ADDRESS.sub("", str(error))
    try:
        if (bare := without_metadata(data, name)) != data:
            return _load_with_pillow(bare, name, max_pixels)
    except (Rejected, MemoryError):
        raise
    except Exception:
        pass  # the failure to decode the whole file is reported
    truncated = any(sign in message.lower() for sign in _TRUNCATED)
    raise Rejected("picture_truncated" if truncated else "picture_corrupt", f"{name}: {message}")


def _load_with_pillow(data: bytes, name: str, max_pixels: int) -> Pixels:
    with _open_with_pillow(data, name, max_pixels) as image:
        width, height = image.size
        pixels = np.empty((height, width, 3), np.uint8)
        for rows, strip in _strips(image):
            pixels[rows] = strip
        return pixels


@contextlib.contextmanager
def _open_with_pillow(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    image_format = FORMATS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about unusual files even if it decodes them correctly
        with Image.open(io.BytesIO(data), formats=[image_format.pillow]) as image:
            _check_pixel_count(image, int(max_pixels / image_format.memory_per_pixel))
            image.load()
            yield image


def _strips(image: Image.Image) -> Iterator[tuple[slice, Pixels]]:
    """Convert an image to RGB in strips of rows. Converting it at once would need memory for several copies of it."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        yield slice(top, top + rows), np.asarray(_to_rgb(strip))


def _check_pixel_count(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("picture_too_large", f"{width}×{height} pixels, at most {max_pixels} are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        image = _to_eight_bits(image)
    if image.mode == "F":
        raise Rejected("picture_unsupported_pixels", "floating-point pixels")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _blend_with_white(image.convert("RGBA"))
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Rejected("picture_unsupported_pixels", f"values from {values.min()} to {values.max()}")
    levels = (values.astype(np.uint16) // 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _blend_with_white(image: Image.Image) -> Image.Image:
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image.getchannel("A"))
    return background


# -- Damage that decoders hide ---------------------------------------------------------------------------------------


def _checked_jpeg(data: bytes, max_pixels: int, pixels: Pixels | None, warning: str) -> Pixels:
    """Return the pixels of a JPEG, unless parts of its data are missing or overwritten.

    Args:
        pixels: Pixels that simplejpeg decoded, or None.
        warning: Warning of simplejpeg.

    Raises: Rejected.
    """
    for reason, pattern in _JPEG_WARNINGS.items():
        if match := pattern.search(warning):
            raise Rejected(reason, f"jpg: {match[0]}")
    if pixels is None:
        return _decode_unusual_jpeg(data, max_pixels)
    if ZEROS in data or _PROGRESSIVE_FRAME in data:  # other damage would have caused a warning
        _reject_damaged_structure(data)
    return pixels


def _reject_damaged_structure(data: bytes) -> None:
    if damage := find_damage(data):
        raise Rejected("picture_corrupt" if damage == OVERWRITTEN else "picture_truncated", f"jpg: {damage}")


def _decode_unusual_jpeg(data: bytes, max_pixels: int) -> Pixels:
    """Decode with Pillow. Find damage that Pillow does not report by decoding changed copies of the file.

    Checksums of the pixels are compared, because the memory of a worker does not suffice for two large images.

    Raises: Rejected.
    """
    if (shorter := without_zeros_before_end(data)) != data:
        with contextlib.suppress(Rejected):  # if the image is complete without the zeros, they are harmless
            return _decode_unusual_jpeg(shorter, max_pixels)
    bare = without_metadata(data, "jpg") if has_huffman_codes(data) else b""
    complete = _pixel_checksum(with_extra_data(bare), max_pixels)
    pixels = _decode_with_pillow(data, "jpg", max_pixels)
    _reject_damaged_structure(data)
    checksum = zlib.crc32(pixels.data)
    if complete not in (checksum, None):
        raise Rejected("picture_truncated", f"jpg: {_PREMATURE_END}")
    if ZEROS in bare and (other := with_other_end(bare)) and _pixel_checksum(other, max_pixels) == checksum:
        raise Rejected("picture_corrupt", f"jpg: {OVERWRITTEN}")
    return pixels


def _pixel_checksum(jpeg: bytes, max_pixels: int) -> int | None:
    """Return a checksum of the decoded pixels, or None if decoding fails."""
    checksum = 0
    try:
        with _open_with_pillow(jpeg, "jpg", max_pixels) as image:
            for _, strip in _strips(image):
                checksum = zlib.crc32(np.ascontiguousarray(strip).data, checksum)
    except MemoryError:
        raise
    except Exception:
        return None
    return checksum


# -- Resizing --------------------------------------------------------------------------------------------------------


def resize_to_square(pixels: Pixels, image_px: int) -> Pixels:
    """Resize pixels [h, w, 3] to [image_px, image_px, 3]. The aspect ratio is not kept."""
    import torch  # imported here because it takes 0.5 GB, which planning and verifying do not need
    from torch.nn.functional import interpolate

    height, width, _ = pixels.shape
    if height == width == image_px:
        return pixels
    image = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)  # [1, 3, h, w]
    if _columns_first(height, width, image_px):
        image = interpolate(image, (image_px, width), mode="bicubic", antialias=True)
    image = interpolate(image, (image_px, image_px), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).contiguous().numpy()


def _columns_first(height: int, width: int, image_px: int) -> bool:
    """Return whether columns are filtered before rows, as in Pillow 13.

    The order changes the result, because each pass rounds and clips the values.
    """
    return height > image_px and height - image_px > 2 * (width - image_px)


# -- Encoding --------------------------------------------------------------------------------------------------------


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode pixels as JPEG. Chroma is not subsampled, because patches are small and questions ask about colours."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_raw(pixels: Pixels) -> bytes:
    """Encode pixels as an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, pixels, allow_pickle=False)
    return buffer.getvalue()


def encode_stored_image(data: bytes, image_px: int, encoding: str) -> tuple[bytes, str]:
    """Convert an image file to the bytes that a shard stores. Return them and their format name. Raises: Rejected."""
    pixels = decode_rgb(data, max_pixels=MAX_WORKER_PIXELS)
    if encoding == "original":
        return data, detect_format(data)
    if encoding == "raw":
        return encode_raw(resize_to_square(pixels, image_px)), "pixels.npy"
    return encode_jpeg(resize_to_square(pixels, image_px)), "jpg"


def decode_stored_image(data: bytes, image_px: int | None = None) -> Pixels:
    """Decode the bytes that `encode_stored_image` returned to RGB [h, w, 3].

    Pass `image_px` to resize images that are stored as original files.
    """
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False)
    pixels = decode_rgb(data, keep_damaged=True)
    return pixels if image_px is None else resize_to_square(pixels, image_px)


@functools.cache
def codec_versions() -> str:
    """Return the versions of the packages that encode images. Other versions may give slightly different images."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "torch"))


# -- Inference -------------------------------------------------------------------------------------------------------


def read_image_file(path: Path, image_px: int) -> Pixels:
    """Load an image file as uint8 [image_px, image_px, 3] for inference.

    The file is found as a build finds it: with other spellings of its path, and in an archive in place of its folder.
    The image is encoded and decoded like the images of JPEG shards, so that the model sees the same JPEG artefacts as
    in training.

    Raises:
        UserError: If the file cannot be read or is not an image.
    """
    try:
        name = str(path) if path.exists() else str(path).replace("\\", "/")
        data = ImageStore(Path("/"), {}).read(str(Path(name).absolute())[1:])
        return decode_rgb(encode_jpeg(resize_to_square(decode_rgb(data), image_px)))
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    except Rejected as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise UserError(f"image {path} cannot be used: {REASONS[error.reason]}{detail}") from None
