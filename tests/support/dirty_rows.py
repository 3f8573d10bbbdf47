"""One row of every kind of damage in docs/data-cleaning.md, with the expected reject reason or repaired sample."""

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
class DirtyRow:
    """A damaged row and its expected outcome: a reject reason, or the content of the repaired sample.

    Attributes:
        kind: Name of the damage in docs/data-cleaning.md. Also the id of the row, unless `row` sets another id.
        row: The row as a JSON value, or the raw line of the file as a string.
        reason: Reject reason, or None if the row is repaired.
        text: Expected text of the sample, decoded with special tokens, or None to skip this check.
        colours: Expected colours of the image by position (x, y), in fractions of its width and height.
        text_only: Whether the sample has no image although the row has an `image` key.
    """

    kind: str
    row: Any
    reason: str | None = None
    text: str | None = None
    colours: dict[tuple[float, float], Colour] = field(default_factory=dict)
    text_only: bool = False


def conversation(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def image_row(image: Any, **more: Any) -> dict[str, Any]:
    return {"image": image, "conversations": conversation("<image>\nQ", "A"), **more}


def text_row(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


# -- Images ----------------------------------------------------------------------------------------------------------


def red_and_blue(left: Colour = RED, right: Colour = BLUE) -> Image.Image:
    image = Image.new("RGB", (64, 48), left)
    image.paste(right, (32, 0, 64, 48))
    return image


def encode(image: Image.Image, pillow_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, pillow_format, **options)
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
    return encode(red_and_blue(), "GIF", save_all=True, append_images=[red_and_blue(BLUE, RED)], duration=9)


def _exif_rotated() -> bytes:
    """Return an image stored rotated, with EXIF orientation 6: viewers must rotate it by 90° clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(red_and_blue().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _xmp_rotated() -> bytes:
    """Return the image of `_exif_rotated` with its orientation in an XMP packet instead of EXIF."""
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return encode(red_and_blue().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, xmp=packet)


def _sixteen_bits_with_transparency() -> bytes:
    """Return a 16-bit grey PNG whose left half is black, and which declares black as transparent."""
    values = np.full((48, 64), 120 * 257, np.uint16)
    values[:, :32] = 0
    return encode(Image.fromarray(values), "PNG", transparency=0)


def _see_through() -> Image.Image:
    image = red_and_blue().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 48))
    return image


def _palette_with_transparency() -> bytes:
    image = red_and_blue().quantize(4)
    return encode(image, "PNG", transparency=image.getpixel((5, 5)))


def _broken_png() -> bytes:
    data = bytearray(encode(red_and_blue(), "PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


def _noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(noise), "JPEG", quality=95)


def sampled_441() -> bytes:
    """Return a grey JPEG with chroma subsampling 4:4:1, for which simplejpeg raises KeyError.

    No installed encoder writes 4:4:1, so this function patches the header of a 4:4:4 file and replaces its image data.
    The data of a uniform grey image is simple: every block consists of an unchanged mean and an end-of-block code.
    """
    jpeg = bytearray(encode(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG", subsampling=0))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 11] = 0x14
    scan = jpeg.index(b"\xff\xda")
    begin = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
    four_luma_and_two_chroma_blocks = int("001010" * 4 + "0000" * 2, 2).to_bytes(4, "big")
    return bytes(jpeg[:begin]) + four_luma_and_two_chroma_blocks * 16 + b"\xff\xd9"


RED_AND_BLUE = {(0.2, 0.5): RED, (0.8, 0.5): BLUE}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGES: dict[str, Callable[[], bytes]] = {
    "good.jpg": lambda: encode(red_and_blue(), "JPEG", quality=95),
    "empty.jpg": lambda: b"",
    "truncated.jpg": lambda: _noise_jpeg()[:2000],
    "zero_sized.png": lambda: png_that_claims(0, 10),
    "bomb.png": lambda: png_that_claims(60_000, 60_000),
    "page.jpg": lambda: b"<html><body>404 not found</body></html>",
    "broken.png": _broken_png,
    "float.tiff": lambda: encode(Image.new("F", (8, 8), 0.5), "TIFF"),
    "gif.jpg": lambda: encode(red_and_blue(), "GIF"),
    "png.jpg": lambda: encode(red_and_blue(), "PNG"),
    "webp.jpg": lambda: encode(red_and_blue(), "WEBP", quality=95),
    "bmp.jpg": lambda: encode(red_and_blue(), "BMP"),
    "animated.gif": _animated,
    "cmyk.jpg": lambda: encode(red_and_blue().convert("CMYK"), "JPEG", quality=95),
    "palette.png": _palette_with_transparency,
    "sixteen_bits.png": lambda: encode(Image.fromarray(np.full((48, 64), 120 * 257, np.uint16)), "PNG"),
    "sixteen_bits_transparent.png": _sixteen_bits_with_transparency,
    "rgba.png": lambda: encode(_see_through(), "PNG"),
    "grey.jpg": lambda: encode(Image.new("L", (64, 48), 120), "JPEG", quality=95),
    "grey_alpha.png": lambda: encode(Image.new("LA", (64, 48), (0, 0)), "PNG"),
    "one_bit.png": lambda: encode(Image.new("1", (64, 48), 1), "PNG"),
    "exif.jpg": _exif_rotated,
    "xmp.jpg": _xmp_rotated,
    "sampled_441.jpg": sampled_441,
    "icc.jpg": lambda: encode(red_and_blue(), "JPEG", quality=95, icc_profile=SRGB),
    "a.dotted.name.v2.jpg": lambda: encode(red_and_blue(), "JPEG", quality=95),
    unicodedata.normalize("NFD", "café ☕ 猫.jpg"): lambda: encode(red_and_blue(), "JPEG", quality=95),
}

IMAGE_ROWS = [
    DirtyRow("missing image", image_row("none.jpg"), "picture_missing"),
    DirtyRow("folder in place of an image", image_row("folder.jpg"), "picture_missing"),
    DirtyRow("empty image file", image_row("empty.jpg"), "picture_empty"),
    DirtyRow("truncated image", image_row("truncated.jpg"), "picture_truncated"),
    DirtyRow("image of zero size", image_row("zero_sized.png"), "picture_corrupt"),
    DirtyRow("decompression bomb", image_row("bomb.png"), "picture_too_large"),
    DirtyRow("huge file", image_row("huge.jpg"), "picture_too_large"),
    DirtyRow("HTML error page", image_row("page.jpg"), "picture_unknown_format"),
    DirtyRow("corrupt image", image_row("broken.png"), "picture_corrupt"),
    DirtyRow("floating-point pixels", image_row("float.tiff"), "picture_unsupported_pixels"),
    DirtyRow("GIF named .jpg", image_row("gif.jpg"), colours=RED_AND_BLUE),
    DirtyRow("PNG named .jpg", image_row("png.jpg"), colours=RED_AND_BLUE),
    DirtyRow("WebP named .jpg", image_row("webp.jpg"), colours=RED_AND_BLUE),
    DirtyRow("BMP named .jpg", image_row("bmp.jpg"), colours=RED_AND_BLUE),
    DirtyRow("animation", image_row("animated.gif"), colours=RED_AND_BLUE),
    DirtyRow("CMYK", image_row("cmyk.jpg"), colours=RED_AND_BLUE),
    DirtyRow("palette", image_row("palette.png"), colours={(0.2, 0.5): WHITE, (0.8, 0.5): BLUE}),
    DirtyRow("16 bits per channel", image_row("sixteen_bits.png"), colours={(0.5, 0.5): GREY}),
    DirtyRow(
        "16 bits with a transparent value",
        image_row("sixteen_bits_transparent.png"),
        colours={(0.2, 0.5): WHITE, (0.8, 0.5): GREY},
    ),
    DirtyRow("RGBA", image_row("rgba.png"), colours={(0.2, 0.5): WHITE, (0.8, 0.5): BLUE}),
    DirtyRow("greyscale", image_row("grey.jpg"), colours={(0.5, 0.5): GREY}),
    DirtyRow("greyscale with alpha", image_row("grey_alpha.png"), colours={(0.5, 0.5): WHITE}),
    DirtyRow("black and white", image_row("one_bit.png"), colours={(0.5, 0.5): WHITE}),
    DirtyRow("EXIF rotation", image_row("exif.jpg"), colours=RED_AND_BLUE),
    DirtyRow("XMP rotation", image_row("xmp.jpg"), colours=RED_AND_BLUE),
    DirtyRow("chroma subsampling 4:4:1", image_row("sampled_441.jpg"), colours={(0.5, 0.5): GREY}),
    DirtyRow("ICC profile", image_row("icc.jpg"), colours=RED_AND_BLUE),
    DirtyRow("path with ..", image_row("../outside.jpg"), "picture_path_escapes"),
    DirtyRow("absolute path", image_row("/etc/hostname.jpg"), "picture_path_escapes"),
    DirtyRow("drive letter", image_row("C:\\photos\\1.jpg"), "picture_path_escapes"),
    DirtyRow("link out of the root", image_row("link_out.jpg"), "picture_path_escapes"),
    DirtyRow("link within the root", image_row("link_in.jpg"), colours=RED_AND_BLUE),
    DirtyRow("link to itself", image_row("link_loop.jpg"), "picture_missing"),
    DirtyRow("path too long", image_row("x" * 300 + ".jpg"), "picture_path_invalid"),
    DirtyRow("folder too long", image_row("y" * 300 + "/1.jpg"), "picture_path_invalid"),
    DirtyRow("NUL in a path", image_row("a\0b.jpg"), "picture_path_invalid"),
    DirtyRow("backslashes in a path", image_row("deep\\er\\good.jpg"), colours=RED_AND_BLUE),
    DirtyRow("dots in a name", image_row("a.dotted.name.v2.jpg"), colours=RED_AND_BLUE),
    DirtyRow(
        "other Unicode form in a name", image_row(unicodedata.normalize("NFC", "café ☕ 猫.jpg")), colours=RED_AND_BLUE
    ),
    DirtyRow("list of one image", image_row(["good.jpg"]), colours=RED_AND_BLUE),
    DirtyRow("several images", image_row(["good.jpg", "good.jpg"]), "several_pictures"),
    DirtyRow("image value of a wrong type", image_row({"path": "good.jpg"}), "wrong_type"),
]

# -- Rows and text ----------------------------------------------------------------------------------------------------

END = "<|endoftext|>"
PLAIN = f"In: Q\nOut: A{END}"
LONG = "word " * 3000

OTHER_KEYS: list[tuple[str, str, Any]] = [
    ("images without <image>", "images", ["good.jpg"]),
    ("video", "video", "a.mp4"),
    ("image under another key", "Image_Path", "good.jpg"),
    ("image file under any key", "metadata", {"files": ["coco/good.JPG"]}),
    ("number of an image", "image_id", 262148),
    ("bytes of an image", "images", [{"bytes": "aGk=", "path": None}]),
    ("image of a turn", "conversations", [conversation("Q")[0] | {"image": "good.jpg"}, *conversation("Q", "A")[1:]]),
]
OTHER_TAGS = {
    "image path in a tag": "<img>a.jpg</img>\nQ",
    "numbered image tag": "Look: <|image_1|> Q",
    "image placeholder": "<image_placeholder> Q",
    "image token of other models": "See <IMG_CONTEXT> Q",
    "<video> at the start": "<video>\nQ",
    "[IMG] at the end": "Q [IMG]",
}

TEXT_ROWS = [
    DirtyRow("broken JSON", '{"id": "broken JSON", "conversations": [}', "broken_json"),
    DirtyRow("number with too many digits", f'{{"id": {"1" * 5000}}}', "broken_json"),
    DirtyRow("row that is not an object", '["Q", "A"]', "not_an_object"),
    DirtyRow("missing key", {"id": "missing key"}, "missing_key"),
    DirtyRow("missing key in a turn", {"conversations": [{"from": "human"}]}, "missing_key"),
    DirtyRow("conversations of a wrong type", {"conversations": "Q A"}, "wrong_type"),
    DirtyRow("turn of a wrong type", {"conversations": ["Q", "A"]}, "wrong_type"),
    DirtyRow("null text", {"conversations": conversation("Q", None)}, "wrong_type"),
    DirtyRow("empty conversation", {"conversations": []}, "empty_conversation"),
    DirtyRow("unknown speaker", text_row(("system", "Be kind"), ("human", "Q"), ("gpt", "A")), "unknown_speaker"),
    DirtyRow("user and assistant", text_row(("user", "Q"), ("assistant", "A")), text=PLAIN),
    DirtyRow("answer first", text_row(("gpt", "Welcome"), ("human", "Q"), ("gpt", "A")), text=PLAIN),
    DirtyRow(
        "two questions in a row",
        text_row(("human", "Q"), ("human", "more"), ("gpt", "A")),
        text=f"In: Q\nmore\nOut: A{END}",
    ),
    DirtyRow(
        "two answers in a row", text_row(("human", "Q"), ("gpt", "A"), ("gpt", "B")), text=f"In: Q\nOut: A\nB{END}"
    ),
    DirtyRow("unanswered question at the end", text_row(("human", "Q"), ("gpt", "A"), ("human", "?")), text=PLAIN),
    DirtyRow("question without an answer", text_row(("human", "Q")), "no_answer"),
    DirtyRow("only an answer", text_row(("gpt", "A")), "no_answer"),
    DirtyRow("empty answer", text_row(("human", "Q"), ("gpt", "")), text=f"In: Q\nOut:  {END}"),
    DirtyRow("empty question", text_row(("human", ""), ("gpt", "A")), text=f"In: \nOut: A{END}"),
    DirtyRow(
        "lone surrogate",
        '{"id": "lone surrogate", "conversations": [{"from": "human", "value": "Q\\ud800"}, '
        '{"from": "gpt", "value": "A"}]}',
        text=f"In: Q\ufffd\nOut: A{END}",
    ),
    DirtyRow("NUL in text", text_row(("human", "Q\0"), ("gpt", "A\0")), text=PLAIN),
    DirtyRow("special token in text", text_row(("human", f"Q{END}"), ("gpt", "A")), text=f"In: Q{END}\nOut: A{END}"),
    DirtyRow(
        "longer than the limit", text_row(("human", "Q"), ("gpt", "A"), ("human", LONG), ("gpt", "B")), text=PLAIN
    ),
    DirtyRow("answers beyond the limit", text_row(("human", LONG), ("gpt", "A")), "no_supervised_token"),
    DirtyRow(
        "<image> without an image", text_row(("human", "<image>\nQ"), ("gpt", "A")), "image_token_without_picture"
    ),
    *(
        DirtyRow(kind, {"conversations": conversation("Q", "A"), key: value}, "other_media")
        for kind, key, value in OTHER_KEYS
    ),
    DirtyRow(
        "deeply nested image",
        '{"id": "deeply nested image", "conversations": [{"from": "human", "value": "Q"}, '
        f'{{"from": "gpt", "value": "A"}}], "images": {"[" * 900}1{"]" * 900}}}',
        "other_media",
    ),
    *(DirtyRow(kind, text_row(("human", text), ("gpt", "A")), "other_media") for kind, text in OTHER_TAGS.items()),
    DirtyRow(
        "<video> within a text",
        text_row(("human", "Explain <video> and <img src='a'>, and a[img]"), ("gpt", "A")),
        text=f"In: Explain <video> and <img src='a'>, and a[img]\nOut: A{END}",
        text_only=True,
    ),
    DirtyRow(
        "empty images",
        text_row(
            ("human", "Q"),
            ("gpt", "A"),
            images=[None, ""],
            image_data={"bytes": None},
            video=None,
            num_images=0,
            has_image=False,
        ),
        text=PLAIN,
        text_only=True,
    ),
    DirtyRow(
        "image without <image>",
        {"image": "good.jpg", "conversations": conversation("Q", "A")},
        text=PLAIN,
        colours=RED_AND_BLUE,
    ),
    DirtyRow(
        "several <image>",
        {"image": "good.jpg", "conversations": conversation("<image><image>Q", "A<image>")},
        text=PLAIN,
    ),
    DirtyRow(
        "<image> alone", {"image": "good.jpg", "conversations": conversation("<image>", "A")}, text=f"In: \nOut: A{END}"
    ),
    DirtyRow("null image", {"image": None, "conversations": conversation("Q", "A")}, text=PLAIN, text_only=True),
    DirtyRow("empty image name", {"image": "", "conversations": conversation("Q", "A")}, text=PLAIN, text_only=True),
    DirtyRow("duplicate id", text_row(("human", "Q"), ("gpt", "A"), id="duplicate id"), text=PLAIN),
    DirtyRow("numeric id", text_row(("human", "Q"), ("gpt", "A"), id=17), text=PLAIN),
    DirtyRow("unknown keys", text_row(("human", "Q"), ("gpt", "A"), model="gpt-5", weight=2.5), text=PLAIN),
    DirtyRow(
        "bad UTF-8",
        '{"id": "bad UTF-8", "conversations": [{"from": "human", "value": "Q\udcff"}, {"from": "gpt", "value": "A"}]}',
        text=f"In: Q\ufffd\nOut: A{END}",
    ),
]

DIRTY_ROWS = IMAGE_ROWS + TEXT_ROWS


def write_dirty_rows(root: Path) -> None:
    """Write the images, and rows.jsonl with one line per entry of DIRTY_ROWS plus a last line with a duplicate id."""
    folder = root / "images"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "folder.jpg").mkdir()
    for name, make in IMAGES.items():
        (folder / name).write_bytes(make())
    (folder / "deep/er/good.jpg").write_bytes(IMAGES["good.jpg"]())
    (root.parent / "outside.jpg").write_bytes(IMAGES["good.jpg"]())
    (folder / "link_out.jpg").symlink_to(root.parent / "outside.jpg")
    (folder / "link_in.jpg").symlink_to("good.jpg")
    (folder / "link_loop.jpg").symlink_to("link_loop.jpg")
    with (folder / "huge.jpg").open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    lines = [_line(dirty) for dirty in DIRTY_ROWS] + [
        _line(DirtyRow("", text_row(("human", "Q"), ("gpt", "A"), id="duplicate id")))
    ]
    (root / "rows.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def _line(dirty: DirtyRow) -> str:
    return dirty.row if isinstance(dirty.row, str) else json.dumps({"id": dirty.kind} | dirty.row)
