"""Images with damaged or huge metadata, which are decoded, and images with missing data, which are rejected."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from skimage import data as photographs

from preprocess.images import codec
from preprocess.images.codec import decode_rgb, read_image_file
from preprocess.images.metadata import turn_upright
from preprocess.rejects import Rejected

PHOTOGRAPH = np.array(Image.fromarray(photographs.coffee()).resize((320, 240)))
SMALL = PHOTOGRAPH[:48, :64]


def encode(pillow_format: str, pixels: np.ndarray = SMALL, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, pillow_format, **options)
    return buffer.getvalue()


# -- Metadata ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes, *, wrong: int = 0) -> bytes:
    """Return a chunk of a PNG. Its checksum is off by the bits of `wrong`."""
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def png_with(*chunks: bytes, late: bool = False) -> bytes:
    png = encode("PNG")
    place = len(png) - 12 if late else 33
    return png[:place] + b"".join(chunks) + png[place:]


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


LARGE = b"a" * (2 << 20)
WITHOUT_CONTENT = [chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"iCCP", b"iTXt", b"zTXt", b"tEXt", b"pHYs")]
PNGS: dict[str, Callable[[], bytes]] = {
    "large iCCP": lambda: png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(LARGE))),
    "large iTXt": lambda: png_with(chunk(b"iTXt", b"k\0\0\0\0\0" + LARGE)),
    "large compressed iTXt": lambda: png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(LARGE))),
    "large zTXt": lambda: png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(LARGE))),
    "many large tEXt": lambda: png_with(*[chunk(b"tEXt", b"k\0" + LARGE[: 1000 << 10])] * 70),
    "wrong checksum of a tEXt": lambda: png_with(chunk(b"tEXt", b"k\0v", wrong=1)),
    "wrong checksum of a late tEXt": lambda: png_with(chunk(b"tEXt", b"k\0v", wrong=1), late=True),
    "garbage in a zTXt": lambda: png_with(chunk(b"zTXt", b"k\0\0garbage")),
    "garbage in an eXIf": lambda: png_with(chunk(b"eXIf", b"garbage" * 9)),
    "chunks without content": lambda: png_with(*WITHOUT_CONTENT),
    "garbage about an animation": lambda: png_with(chunk(b"acTL", b"\0"), chunk(b"fcTL", bytes(26))),
}


@pytest.mark.parametrize("kind", PNGS)
def test_damaged_or_large_metadata_of_a_png_does_not_change_its_pixels(kind: str) -> None:
    assert np.array_equal(decode_rgb(PNGS[kind]()), SMALL)


JPEG_SEGMENTS = {
    "a short JFIF header": (0xE0, b"JFIF\0"),
    "a short Adobe header": (0xEE, b"Adobe"),
    "garbage in an Exif segment": (0xE1, b"Exif\0\0garbage"),
    "garbage in an MPF segment": (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "garbage in a Photoshop segment": (0xED, b"Photoshop 3.0\0" + b"8BIM" * 9),
    "a huge XMP packet": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 65000),
}


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("kind", JPEG_SEGMENTS)
def test_damaged_or_large_metadata_of_a_jpeg_does_not_change_its_pixels(kind: str, mode: str) -> None:
    jpeg = encode("JPEG", mode=mode, quality=95)
    assert np.array_equal(decode_rgb(with_segment(jpeg, *JPEG_SEGMENTS[kind])), decode_rgb(jpeg))


def tiff_with(tag: int, kind: int, count: int, value: int) -> bytes:
    """Return a TIFF with one more entry in its directory, and with orientation 6."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6
    tiff = encode("TIFF", tiffinfo=tags)
    (start,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, start)
    directory = [tiff[at : at + 12] for at in range(start + 2, start + 2 + 12 * entries, 12)]
    directory = sorted([*directory, struct.pack("<HHII", tag, kind, count, value)], key=lambda entry: entry[1::-1])
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + struct.pack("<H", entries + 1) + b"".join(directory)


@pytest.mark.parametrize("entry", [(0x010F, 2, 0xFFFFFFF, 8), (0x8769, 4, 1, 8), (0x011A, 10, 1, 8)])
def test_damaged_metadata_of_a_tiff_does_not_change_its_pixels(entry: tuple[int, int, int, int]) -> None:
    assert np.array_equal(decode_rgb(tiff_with(*entry)), turn_upright(SMALL, 6))


TRANSPOSITIONS = [None, None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2))]


def test_pixels_are_turned_as_pillow_turns_them_for_every_orientation() -> None:
    image = Image.fromarray(SMALL)
    for orientation in range(1, 9):
        method = TRANSPOSITIONS[orientation]
        expected = image if method is None else image.transpose(method)
        assert np.array_equal(turn_upright(SMALL, orientation), np.asarray(expected)), orientation


def exif(order: str, *entries: tuple[int, int, int, bytes], extra: bytes = b"") -> bytes:
    """Return an EXIF packet. `extra` follows the entries of the directory."""
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    packed = [struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    return header + struct.pack(f"{order}H", len(packed)) + b"".join(packed) + bytes(4) + extra


def orientation_6(order: str = "<", kind: int = 3) -> tuple[int, int, int, bytes]:
    return 0x0112, kind, 1, struct.pack(f"{order}{'H' if kind == 3 else 'I'}", 6)


END = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # position after a directory of two entries
EXIF = {
    "little-endian": exif("<", orientation_6()),
    "big-endian": exif(">", orientation_6(">")),
    "orientation as a long integer": exif("<", orientation_6(kind=4)),
    "resolution of -1/0": exif("<", orientation_6(), (0x011A, 10, 1, END), extra=struct.pack("<ii", -1, 0)),
    "software as a rational": exif("<", orientation_6(), (0x0131, 5, 1, END), extra=struct.pack("<II", 1, 2)),
    "maker longer than the file": exif("<", (0x010F, 2, 0xFFFFFFF, END), orientation_6()),
    "directory within itself": exif("<", orientation_6(), (0x8769, 4, 1, struct.pack("<I", 8))),
    "directory outside the file": exif("<", orientation_6(), (0x8769, 4, 1, b"\xf0\xff\xff\xff")),
    "cut off after the orientation": exif("<", orientation_6(), (0x0131, 5, 1, END))[:24],
}
CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda packet: with_segment(encode("JPEG", quality=95), 0xE1, b"Exif\0\0" + packet),
    "CMYK JPEG": lambda packet: with_segment(encode("JPEG", mode="CMYK", quality=95), 0xE1, b"Exif\0\0" + packet),
    "PNG": lambda packet: png_with(chunk(b"eXIf", packet)),
    "PNG, after the pixels": lambda packet: png_with(chunk(b"eXIf", packet, wrong=1), late=True),
    "PNG, as hexadecimal text": lambda packet: png_with(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n    9\n" + packet.hex().encode()))
    ),
    "WebP": lambda packet: encode("WEBP", lossless=True, exif=packet),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", EXIF)
def test_images_are_turned_upright_although_their_exif_data_has_odd_entries(kind: str, container: str) -> None:
    upright = decode_rgb(CONTAINERS[container](exif("<")))
    assert upright.shape == SMALL.shape
    assert np.array_equal(decode_rgb(CONTAINERS[container](EXIF[kind])), turn_upright(upright, 6))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda packet: with_segment(encode("JPEG"), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet),
    "PNG": lambda packet: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)),
    "compressed PNG": lambda packet: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(packet))),
    "WebP": lambda packet: encode("WEBP", lossless=True, xmp=packet),
}


@pytest.mark.parametrize("container", XMP_CONTAINERS)
def test_images_are_turned_upright_by_their_xmp_data_if_they_have_no_exif_data(container: str) -> None:
    upright = decode_rgb(XMP_CONTAINERS[container](b"<x/>"))
    assert np.array_equal(decode_rgb(XMP_CONTAINERS[container](XMP)), turn_upright(upright, 6))


def test_inference_reads_an_image_with_odd_metadata_as_a_build_does(tmp_path: Path) -> None:
    (tmp_path / "odd.png").write_bytes(
        png_with(chunk(b"eXIf", EXIF["resolution of -1/0"]), chunk(b"tEXt", b"k\0", wrong=1))
    )
    (tmp_path / "plain.png").write_bytes(encode("PNG", turn_upright(SMALL, 6)))
    assert np.array_equal(read_image_file(tmp_path / "odd.png", 32), read_image_file(tmp_path / "plain.png", 32))


NOT_IMAGES = {
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "a Git LFS pointer: .*git lfs pull",
    ),
    "HTML page": (b"<!DOCTYPE html><html>", "an HTML or XML page: download it again"),
    "zip": (b"PK\x03\x04", "a zip file: unpack it"),
    "text": (b"hello world", "starts with b'hello wo'"),
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_the_reject_for_a_file_that_is_no_image_names_what_was_found(kind: str) -> None:
    data, detail = NOT_IMAGES[kind]
    with pytest.raises(Rejected, match=f"picture_unknown_format: {detail}"):
        decode_rgb(data)


def test_damaged_originals_in_shards_of_earlier_versions_are_still_decoded() -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, quality=90)
    half = DAMAGE["cut in half and closed"](jpeg)
    assert np.array_equal(codec.decode_stored_image(half), np.asarray(Image.open(io.BytesIO(half))))


# -- Missing data ------------------------------------------------------------------------------------------------------


JPEGS: dict[str, dict[str, Any]] = {
    "photograph": {"quality": 90},
    "high quality": {"quality": 98, "subsampling": 0},
    "low quality with optimised codes": {"quality": 30, "optimize": True},
    "progressive": {"quality": 85, "progressive": True},
    "with restart markers": {"quality": 80, "restart_marker_rows": 1},
    "progressive with restart markers": {"quality": 80, "progressive": True, "restart_marker_rows": 2},
    "greyscale": {"quality": 85, "mode": "L"},
    "CMYK": {"quality": 85, "mode": "CMYK"},
    "with EXIF data": {"quality": 85, "exif": EXIF["little-endian"]},
}
END_MARKER = b"\xff\xd9"


def middle(jpeg: bytes) -> int:
    scan = jpeg.index(b"\xff\xda")
    return (scan + len(jpeg)) // 2


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in half and closed": lambda jpeg: jpeg[: middle(jpeg)] + END_MARKER,
    "zeros in the middle": lambda jpeg: jpeg[: middle(jpeg)] + bytes(2048) + jpeg[middle(jpeg) + 2048 :],
    "second half zeroed": lambda jpeg: jpeg[: middle(jpeg)] + bytes(len(jpeg) - middle(jpeg) - 2) + END_MARKER,
}
JUNK = bytes(value for value in np.random.Generator(np.random.Philox(key=1)).bytes(220) if value != 0xFF)[:200]
HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "bytes before the end marker": lambda jpeg: jpeg[:-2] + JUNK + END_MARKER,
    "zeros before the end marker": lambda jpeg: jpeg[:-2] + bytes(200) + END_MARKER,
    "a page of zeros before the end marker": lambda jpeg: jpeg[:-2] + bytes(4096) + END_MARKER,
    "bytes after the end marker": lambda jpeg: jpeg + JUNK,
    "zeros after the end marker": lambda jpeg: jpeg + bytes(4096),
    "a second image after the end marker": lambda jpeg: jpeg + jpeg[: len(jpeg) // 2],
}


@pytest.fixture(params=["simplejpeg", "Pillow alone"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Pillow alone":
        monkeypatch.setattr(codec, "simplejpeg", None)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_data_is_missing_or_overwritten_is_rejected(kind: str, damage: str) -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, **JPEGS[kind])
    with pytest.raises(Rejected, match=r"picture_(truncated|corrupt): jpg: "):
        decode_rgb(DAMAGE[damage](jpeg))


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("addition", HARMLESS)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_with_harmless_additional_bytes_is_decoded(kind: str, addition: str) -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, **JPEGS[kind])
    assert np.array_equal(decode_rgb(HARMLESS[addition](jpeg)), decode_rgb(jpeg))


def _flat_images() -> Iterator[np.ndarray]:
    """Yield images whose data contains long runs of zeros, because their colours are flat."""
    page = np.full((1000, 1000, 3), 255, np.uint8)
    page[::500, ::500] = 0
    yield from (page, np.zeros_like(page), np.full_like(page, 77))


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("options", [{"optimize": True, "quality": 10}, {"progressive": True}], ids=str)
def test_zeros_that_are_the_codes_of_flat_colour_are_no_damage(options: dict[str, Any]) -> None:
    for pixels in _flat_images():
        jpeg = encode("JPEG", pixels, **options)
        assert codec.ZEROS in jpeg
        for file in (jpeg, HARMLESS["bytes before the end marker"](jpeg)):
            assert decode_rgb(file).shape == pixels.shape


@pytest.mark.usefixtures("_decoder")
def test_zeros_that_end_an_image_early_are_found_even_as_codes_of_flat_colour() -> None:
    """Data remains after the last block, because zeros are short codes. Harmless bytes remain as well, but fewer."""
    jpeg = encode("JPEG", np.array(Image.fromarray(PHOTOGRAPH).resize((640, 480))), quality=30, optimize=True)
    for damage in ("zeros in the middle", "second half zeroed"):
        with pytest.raises(Rejected, match="picture_corrupt: jpg: its data was overwritten by zeros"):
            decode_rgb(DAMAGE[damage](jpeg))


@pytest.mark.usefixtures("_decoder")
def test_a_progressive_jpeg_that_ends_between_two_scans_is_rejected() -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, progressive=True)
    last_tables = jpeg.rindex(b"\xff\xc4")
    with pytest.raises(Rejected, match="picture_truncated: jpg: scans are missing"):
        decode_rgb(jpeg[:last_tables] + END_MARKER)


@pytest.mark.usefixtures("_decoder")
def test_a_jpeg_that_ends_before_a_restart_marker_is_rejected() -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, restart_marker_rows=1)
    with pytest.raises(
        Rejected, match=r"picture_(truncated|corrupt): jpg: .*(restart markers are missing|instead of RST)"
    ):
        decode_rgb(jpeg[: jpeg.index(b"\xff\xd6")] + END_MARKER)


def test_codes_that_do_not_exist_are_reported_by_simplejpeg() -> None:
    jpeg = encode("JPEG", PHOTOGRAPH, quality=85, progressive=True)
    ones = jpeg[: middle(jpeg)] + b"\xff\x00" * 50 + jpeg[middle(jpeg) + 100 :]
    with pytest.raises(Rejected, match="picture_corrupt: jpg: bad Huffman code"):
        decode_rgb(ones)


@pytest.mark.usefixtures("_decoder")
def test_missing_data_is_found_after_a_scan_with_additional_bytes() -> None:
    """libjpeg reports only the first of several warnings, which is harmless here."""
    jpeg = encode("JPEG", PHOTOGRAPH, progressive=True)
    second_scan = jpeg.index(b"\xff\xda", jpeg.index(b"\xff\xda") + 2)
    tables = jpeg.rindex(b"\xff\xc4", 0, second_scan)
    added = jpeg[:tables] + JUNK + jpeg[tables:-2]
    assert np.array_equal(decode_rgb(added + END_MARKER), decode_rgb(jpeg))
    with pytest.raises(Rejected, match="picture_truncated: jpg: premature end of data segment"):
        decode_rgb(added[:-500] + END_MARKER)


def test_png_data_is_rejected_if_its_checksums_do_not_match() -> None:
    png = encode("PNG", PHOTOGRAPH)
    damaged = png[:-116] + bytes(100) + png[-16:]  # Pillow decodes all rows before it reaches the damage
    with pytest.raises(Rejected, match="picture_corrupt: png: the checksum of its pixel data does not match"):
        decode_rgb(damaged)
    wrong_chunk_checksum = png[:-16] + b"\0\0\0\0" + png[-12:]
    assert np.array_equal(decode_rgb(wrong_chunk_checksum), PHOTOGRAPH)
    header = png[:29] + b"\0\0\0\0" + png[33:]
    with pytest.raises(Rejected, match="picture_corrupt: png"):
        decode_rgb(header)
