"""Every kind of damaged row that the builder knows: how to make it, and its expected result (docs/data-cleaning.md)."""

from __future__ import annotations

import io
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from preprocess.images.store import MAX_FILE_BYTES

Colour = tuple[int, int, int]
RED, BLUE, GREY, WHITE = (200, 40, 40), (40, 60, 200), (120, 120, 120), (255, 255, 255)


@dataclass(frozen=True)
class Dirt:
    """One damaged row, and either the reason why it is rejected or what is right about the sample made of it.

    row         the JSON value; a string stands for the line as it is. Rows get the id "KIND" unless they have one
    reason      None if the row is repaired
    text        of the whole sample, special tokens included
    colours     at (across, down) in fractions of the picture
    """

    kind: str
    row: Any
    reason: str | None = None
    text: str | None = None
    colours: dict[tuple[float, float], Colour] = field(default_factory=dict)
    no_picture: bool = False


def said(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def about(picture: Any, **more: Any) -> dict[str, Any]:
    return {"image": picture, "conversations": said("<image>\nQ", "A"), **more}


def talk(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


# -- Pictures --------------------------------------------------------------------------------------------------------


def two_halves(left: Colour = RED, right: Colour = BLUE) -> Image.Image:
    picture = Image.new("RGB", (64, 48), left)
    picture.paste(right, (32, 0, 64, 48))
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _animated() -> bytes:
    return encoded(two_halves(), "GIF", save_all=True, append_images=[two_halves(BLUE, RED)], duration=9)


def _exif_rotated() -> bytes:
    """Stored lying on its side; EXIF orientation 6 asks to turn it by 90° clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(two_halves().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _xmp_rotated() -> bytes:
    """The same, asked for by an XMP packet alone."""
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return encoded(two_halves().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, xmp=packet)


def _sixteen_bits_with_transparency() -> bytes:
    """Black to the left, which is declared transparent."""
    values = np.full((48, 64), 120 * 257, np.uint16)
    values[:, :32] = 0
    return encoded(Image.fromarray(values), "PNG", transparency=0)


def _see_through() -> Image.Image:
    picture = two_halves().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 32, 48))
    return picture


def _palette_with_transparency() -> bytes:
    picture = two_halves().quantize(4)
    return encoded(picture, "PNG", transparency=picture.getpixel((5, 5)))


def _broken_png() -> bytes:
    data = bytearray(encoded(two_halves(), "PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


def _noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", quality=95)


def sampled_441() -> bytes:
    """Grey, with a colour for each eight pixels by 32 that lie eight abreast: rare enough to have no name anywhere.

    Nothing that is at hand writes such. In a grey picture every block is the same bits: no change of the mean, the end.
    """
    lines = bytearray(encoded(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG", subsampling=0))
    frame = lines.index(b"\xff\xc0")
    lines[frame + 11] = 0x14
    scan = lines.index(b"\xff\xda")
    begin = scan + 2 + int.from_bytes(lines[scan + 2 : scan + 4], "big")
    four_of_grey_and_two_of_colour = int("001010" * 4 + "0000" * 2, 2).to_bytes(4, "big")
    return bytes(lines[:begin]) + four_of_grey_and_two_of_colour * 16 + b"\xff\xd9"


HALVES = {(0.2, 0.5): RED, (0.8, 0.5): BLUE}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURES: dict[str, Callable[[], bytes]] = {
    "good.jpg": lambda: encoded(two_halves(), "JPEG", quality=95),
    "empty.jpg": lambda: b"",
    "truncated.jpg": lambda: _noise_jpeg()[:2000],
    "zero_sized.png": lambda: png_that_claims(0, 10),
    "bomb.png": lambda: png_that_claims(60_000, 60_000),
    "page.jpg": lambda: b"<html><body>404 not found</body></html>",
    "broken.png": _broken_png,
    "float.tiff": lambda: encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
    "gif.jpg": lambda: encoded(two_halves(), "GIF"),
    "png.jpg": lambda: encoded(two_halves(), "PNG"),
    "webp.jpg": lambda: encoded(two_halves(), "WEBP", quality=95),
    "bmp.jpg": lambda: encoded(two_halves(), "BMP"),
    "animated.gif": _animated,
    "cmyk.jpg": lambda: encoded(two_halves().convert("CMYK"), "JPEG", quality=95),
    "palette.png": _palette_with_transparency,
    "sixteen_bits.png": lambda: encoded(Image.fromarray(np.full((48, 64), 120 * 257, np.uint16)), "PNG"),
    "sixteen_bits_transparent.png": _sixteen_bits_with_transparency,
    "rgba.png": lambda: encoded(_see_through(), "PNG"),
    "grey.jpg": lambda: encoded(Image.new("L", (64, 48), 120), "JPEG", quality=95),
    "grey_alpha.png": lambda: encoded(Image.new("LA", (64, 48), (0, 0)), "PNG"),
    "one_bit.png": lambda: encoded(Image.new("1", (64, 48), 1), "PNG"),
    "exif.jpg": _exif_rotated,
    "xmp.jpg": _xmp_rotated,
    "sampled_441.jpg": sampled_441,
    "icc.jpg": lambda: encoded(two_halves(), "JPEG", quality=95, icc_profile=SRGB),
    "a.dotted.name.v2.jpg": lambda: encoded(two_halves(), "JPEG", quality=95),
    unicodedata.normalize("NFD", "café ☕ 猫.jpg"): lambda: encoded(two_halves(), "JPEG", quality=95),
}

PICTURE_DIRT = [
    Dirt("missing picture", about("none.jpg"), "picture_missing"),
    Dirt("folder in place of a picture", about("folder.jpg"), "picture_missing"),
    Dirt("empty picture", about("empty.jpg"), "picture_empty"),
    Dirt("truncated picture", about("truncated.jpg"), "picture_truncated"),
    Dirt("picture of zero size", about("zero_sized.png"), "picture_corrupt"),
    Dirt("decompression bomb", about("bomb.png"), "picture_too_large"),
    Dirt("huge file", about("huge.jpg"), "picture_too_large"),
    Dirt("page of a web server", about("page.jpg"), "picture_unknown_format"),
    Dirt("corrupt picture", about("broken.png"), "picture_corrupt"),
    Dirt("floating-point pixels", about("float.tiff"), "picture_unsupported_pixels"),
    Dirt("GIF named .jpg", about("gif.jpg"), colours=HALVES),
    Dirt("PNG named .jpg", about("png.jpg"), colours=HALVES),
    Dirt("WebP named .jpg", about("webp.jpg"), colours=HALVES),
    Dirt("BMP named .jpg", about("bmp.jpg"), colours=HALVES),
    Dirt("animation", about("animated.gif"), colours=HALVES),
    Dirt("CMYK", about("cmyk.jpg"), colours=HALVES),
    Dirt("palette", about("palette.png"), colours={(0.2, 0.5): WHITE, (0.8, 0.5): BLUE}),
    Dirt("16 bits", about("sixteen_bits.png"), colours={(0.5, 0.5): GREY}),
    Dirt(
        "16 bits with a transparent value",
        about("sixteen_bits_transparent.png"),
        colours={(0.2, 0.5): WHITE, (0.8, 0.5): GREY},
    ),
    Dirt("RGBA", about("rgba.png"), colours={(0.2, 0.5): WHITE, (0.8, 0.5): BLUE}),
    Dirt("greyscale", about("grey.jpg"), colours={(0.5, 0.5): GREY}),
    Dirt("greyscale with alpha", about("grey_alpha.png"), colours={(0.5, 0.5): WHITE}),
    Dirt("black and white", about("one_bit.png"), colours={(0.5, 0.5): WHITE}),
    Dirt("EXIF rotation", about("exif.jpg"), colours=HALVES),
    Dirt("XMP rotation", about("xmp.jpg"), colours=HALVES),
    Dirt("colours sampled 4:4:1", about("sampled_441.jpg"), colours={(0.5, 0.5): GREY}),
    Dirt("ICC profile", about("icc.jpg"), colours=HALVES),
    Dirt("path with ..", about("../outside.jpg"), "picture_path_escapes"),
    Dirt("absolute path", about("/etc/hostname.jpg"), "picture_path_escapes"),
    Dirt("drive letter", about("C:\\photos\\1.jpg"), "picture_path_escapes"),
    Dirt("link out of the root", about("link_out.jpg"), "picture_path_escapes"),
    Dirt("link within the root", about("link_in.jpg"), colours=HALVES),
    Dirt("link to itself", about("link_loop.jpg"), "picture_missing"),
    Dirt("path too long", about("x" * 300 + ".jpg"), "picture_path_invalid"),
    Dirt("folder too long", about("y" * 300 + "/1.jpg"), "picture_path_invalid"),
    Dirt("NUL in a path", about("a\0b.jpg"), "picture_path_invalid"),
    Dirt("backslashes in a path", about("deep\\er\\good.jpg"), colours=HALVES),
    Dirt("dots in a name", about("a.dotted.name.v2.jpg"), colours=HALVES),
    Dirt("other Unicode form in a name", about(unicodedata.normalize("NFC", "café ☕ 猫.jpg")), colours=HALVES),
    Dirt("list of one picture", about(["good.jpg"]), colours=HALVES),
    Dirt("several pictures", about(["good.jpg", "good.jpg"]), "several_pictures"),
    Dirt("picture of a wrong type", about({"path": "good.jpg"}), "wrong_type"),
]

# -- Rows ------------------------------------------------------------------------------------------------------------

END = "<|endoftext|>"
PLAIN = f"In: Q\nOut: A{END}"
LONG = "word " * 3000

ROW_DIRT = [
    Dirt("broken JSON", '{"id": "broken JSON", "conversations": [}', "broken_json"),
    Dirt("number of too many digits", f'{{"id": {"1" * 5000}}}', "broken_json"),
    Dirt("row that is no object", '["Q", "A"]', "not_an_object"),
    Dirt("missing key", {"id": "missing key"}, "missing_key"),
    Dirt("missing key in a turn", {"conversations": [{"from": "human"}]}, "missing_key"),
    Dirt("conversations of a wrong type", {"conversations": "Q A"}, "wrong_type"),
    Dirt("turn of a wrong type", {"conversations": ["Q", "A"]}, "wrong_type"),
    Dirt("null for text", {"conversations": said("Q", None)}, "wrong_type"),
    Dirt("empty conversation", {"conversations": []}, "empty_conversation"),
    Dirt("unknown speaker", talk(("system", "Be kind"), ("human", "Q"), ("gpt", "A")), "unknown_speaker"),
    Dirt("user and assistant", talk(("user", "Q"), ("assistant", "A")), text=PLAIN),
    Dirt("gpt first", talk(("gpt", "Welcome"), ("human", "Q"), ("gpt", "A")), text=PLAIN),
    Dirt(
        "two humans in a row", talk(("human", "Q"), ("human", "more"), ("gpt", "A")), text=f"In: Q\nmore\nOut: A{END}"
    ),
    Dirt("two answers in a row", talk(("human", "Q"), ("gpt", "A"), ("gpt", "B")), text=f"In: Q\nOut: A\nB{END}"),
    Dirt("unanswered question at the end", talk(("human", "Q"), ("gpt", "A"), ("human", "?")), text=PLAIN),
    Dirt("no answer", talk(("human", "Q")), "no_answer"),
    Dirt("nothing but an answer", talk(("gpt", "A")), "no_answer"),
    Dirt("empty answer", talk(("human", "Q"), ("gpt", "")), text=f"In: Q\nOut:  {END}"),
    Dirt("empty question", talk(("human", ""), ("gpt", "A")), text=f"In: \nOut: A{END}"),
    Dirt(
        "lone surrogate",
        '{"id": "lone surrogate", "conversations": [{"from": "human", "value": "Q\\ud800"}, '
        '{"from": "gpt", "value": "A"}]}',
        text=f"In: Q\ufffd\nOut: A{END}",
    ),
    Dirt("NUL in text", talk(("human", "Q\0"), ("gpt", "A\0")), text=PLAIN),
    Dirt("special token in text", talk(("human", f"Q{END}"), ("gpt", "A")), text=f"In: Q{END}\nOut: A{END}"),
    Dirt("longer than the limit", talk(("human", "Q"), ("gpt", "A"), ("human", LONG), ("gpt", "B")), text=PLAIN),
    Dirt("answers beyond the limit", talk(("human", LONG), ("gpt", "A")), "no_supervised_token"),
    Dirt("<image> without picture", talk(("human", "<image>\nQ"), ("gpt", "A")), "image_token_without_picture"),
    Dirt("picture without <image>", {"image": "good.jpg", "conversations": said("Q", "A")}, text=PLAIN, colours=HALVES),
    Dirt("several <image>", {"image": "good.jpg", "conversations": said("<image><image>Q", "A<image>")}, text=PLAIN),
    Dirt("<image> alone", {"image": "good.jpg", "conversations": said("<image>", "A")}, text=f"In: \nOut: A{END}"),
    Dirt("null for a picture", {"image": None, "conversations": said("Q", "A")}, text=PLAIN, no_picture=True),
    Dirt("empty name for a picture", {"image": "", "conversations": said("Q", "A")}, text=PLAIN, no_picture=True),
    Dirt("duplicate id", talk(("human", "Q"), ("gpt", "A"), id="duplicate id"), text=PLAIN),
    Dirt("number for an id", talk(("human", "Q"), ("gpt", "A"), id=17), text=PLAIN),
    Dirt("unknown keys", talk(("human", "Q"), ("gpt", "A"), model="gpt-5", weight=2.5), text=PLAIN),
    Dirt(
        "bad UTF-8",
        '{"id": "bad UTF-8", "conversations": [{"from": "human", "value": "Q\udcff"}, {"from": "gpt", "value": "A"}]}',
        text=f"In: Q\ufffd\nOut: A{END}",
    ),
]

ALL = PICTURE_DIRT + ROW_DIRT


def write_dirt(root: Path) -> None:
    """One JSONL file, one row per kind and in that order, and the pictures. A duplicate of one id stands at the end."""
    pictures = root / "pictures"
    (pictures / "deep/er").mkdir(parents=True)
    (pictures / "folder.jpg").mkdir()
    for name, make in PICTURES.items():
        (pictures / name).write_bytes(make())
    (pictures / "deep/er/good.jpg").write_bytes(PICTURES["good.jpg"]())
    (root.parent / "outside.jpg").write_bytes(PICTURES["good.jpg"]())
    (pictures / "link_out.jpg").symlink_to(root.parent / "outside.jpg")
    (pictures / "link_in.jpg").symlink_to("good.jpg")
    (pictures / "link_loop.jpg").symlink_to("link_loop.jpg")
    with (pictures / "huge.jpg").open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    lines = [_line(dirt) for dirt in ALL] + [_line(Dirt("", talk(("human", "Q"), ("gpt", "A"), id="duplicate id")))]
    (root / "dirt.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def _line(dirt: Dirt) -> str:
    if isinstance(dirt.row, str):
        return dirt.row
    return json.dumps({"id": dirt.kind} | dirt.row)
