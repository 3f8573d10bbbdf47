"""Rows of the demo's mix that look wrong: a dozen that cannot be used, and some that the builder repairs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from preprocess.demo.scenes import Scene, render

FOLDER = "damaged"  # of the picture files, under the root

RED_CIRCLE = Scene((168, 168, 168), "red", (208, 30, 38), (0, 0), shape="circle", radius=28, cells=((1, 1),))


def _encoded(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    render(RED_CIRCLE).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _corrupt_png() -> bytes:
    data = bytearray(_encoded("PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


def write_images(root: Path) -> None:
    """The picture files that the rows below name, as far as they exist."""
    pictures = {
        "cmyk.jpg": _encoded("JPEG", "CMYK"),
        "corrupt.png": _corrupt_png(),
        "empty.jpg": b"",
        "gif_named.jpg": _encoded("GIF"),
        "not_found.jpg": b"<html><body>404 Not Found</body></html>",
        "truncated.jpg": _encoded("JPEG")[:900],
    }
    (root / FOLDER).mkdir()
    for name, data in pictures.items():
        (root / FOLDER / name).write_bytes(data)


def _row(row_id: str, picture: str | None, *turns: tuple[str, Any]) -> dict[str, Any]:
    image = {"image": f"{FOLDER}/{picture}"} if picture else {}
    return {"id": row_id, **image, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


_ASKED = ("human", "<image>\nWhat colour is it?")
_RED = ("gpt", "red")

# Source -> (why it is rejected, the row).
DAMAGED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llava": [
        ("picture_truncated", _row("truncated", "truncated.jpg", _ASKED, _RED)),
        ("picture_missing", _row("lost", "lost.jpg", _ASKED, _RED)),
        ("picture_empty", _row("empty-file", "empty.jpg", _ASKED, _RED)),
        ("picture_unknown_format", _row("not-a-picture", "not_found.jpg", _ASKED, _RED)),
        ("empty_conversation", _row("says-nothing", "gif_named.jpg")),
        ("no_answer", _row("asks-only", "gif_named.jpg", _ASKED)),
        ("unknown_speaker", _row("third-voice", "gif_named.jpg", _ASKED, ("narrator", "red"))),
        ("image_token_without_picture", _row("no-picture", None, _ASKED, _RED)),
    ],
    "lvis": [
        ("picture_corrupt", _row("corrupt", "corrupt.png", _ASKED, _RED)),
        ("wrong_type", _row("answer-is-a-number", "gif_named.jpg", _ASKED, ("gpt", 4))),
    ],
    "lrv": [
        (
            "picture_missing",
            {"image_id": "999999", "question": "What colour is it?", "answer": "red", "task": "colour"},
        ),
        ("missing_key", {"image_id": "000000", "question": "What colour is it?", "task": "colour"}),
    ],
}

REPAIRABLE: dict[str, list[dict[str, Any]]] = {
    "llava": [
        _row("gif-named-jpg", "gif_named.jpg", _ASKED, _RED),
        _row("cmyk", "cmyk.jpg", ("human", "<image>\nWhich shape is it?"), ("gpt", "circle")),
        _row("gpt-speaks-first", None, ("gpt", "Hello!"), ("human", "Can fish breathe in water?"), ("gpt", "Yes.")),
    ],
    "lvis": [_row("asked-twice", "gif_named.jpg", _ASKED, ("human", "Please tell me."), _RED)],
    "lrv": [],
}
