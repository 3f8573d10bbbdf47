"""Damaged rows and image files of the demo's raw data: rows that a build rejects, and rows that it repairs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from preprocess.demo.scenes import Scene, render

FOLDER = "damaged"  # folder of the damaged image files, below the root

RED_CIRCLE = Scene(
    background=(168, 168, 168),
    colour="red",
    paint=(208, 30, 38),
    jitter=(0, 0),
    shape="circle",
    radius=28,
    cells=((1, 1),),
)


def _encoded(pillow_format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    render(RED_CIRCLE).convert(mode).save(buffer, pillow_format)
    return buffer.getvalue()


def _corrupt_png() -> bytes:
    data = bytearray(_encoded("PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


def write_images(root: Path) -> None:
    """Write the image files that the rows below name, except the missing ones."""
    images = {
        "cmyk.jpg": _encoded("JPEG", "CMYK"),
        "corrupt.png": _corrupt_png(),
        "empty.jpg": b"",
        "gif_named.jpg": _encoded("GIF"),
        "not_found.jpg": b"<html><body>404 Not Found</body></html>",
        "truncated.jpg": _encoded("JPEG")[:900],
    }
    (root / FOLDER).mkdir()
    for name, data in images.items():
        (root / FOLDER / name).write_bytes(data)


def _row(row_id: str, image: str | None, *turns: tuple[str, Any]) -> dict[str, Any]:
    named = {"image": f"{FOLDER}/{image}"} if image else {}
    return {"id": row_id, **named, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


_QUESTION = ("human", "<image>\nWhat colour is it?")
_ANSWER = ("gpt", "red")

# Rows that a build rejects: source -> (reject reason, row).
DAMAGED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llava": [
        ("picture_truncated", _row("truncated", "truncated.jpg", _QUESTION, _ANSWER)),
        ("picture_missing", _row("lost", "lost.jpg", _QUESTION, _ANSWER)),
        ("picture_empty", _row("empty-file", "empty.jpg", _QUESTION, _ANSWER)),
        ("picture_unknown_format", _row("not-a-picture", "not_found.jpg", _QUESTION, _ANSWER)),
        ("empty_conversation", _row("says-nothing", "gif_named.jpg")),
        ("no_answer", _row("asks-only", "gif_named.jpg", _QUESTION)),
        ("unknown_speaker", _row("third-voice", "gif_named.jpg", _QUESTION, ("narrator", "red"))),
        ("image_token_without_picture", _row("no-picture", None, _QUESTION, _ANSWER)),
    ],
    "lvis": [
        ("picture_corrupt", _row("corrupt", "corrupt.png", _QUESTION, _ANSWER)),
        ("wrong_type", _row("answer-is-a-number", "gif_named.jpg", _QUESTION, ("gpt", 4))),
    ],
    "lrv": [
        (
            "picture_missing",
            {"image_id": "999999", "question": "What colour is it?", "answer": "red", "task": "colour"},
        ),
        ("missing_key", {"image_id": "000000", "question": "What colour is it?", "task": "colour"}),
    ],
}

# Rows that a build repairs, so that they become samples: source -> rows.
REPAIRABLE: dict[str, list[dict[str, Any]]] = {
    "llava": [
        _row("gif-named-jpg", "gif_named.jpg", _QUESTION, _ANSWER),
        _row("cmyk", "cmyk.jpg", ("human", "<image>\nWhich shape is it?"), ("gpt", "circle")),
        _row("gpt-speaks-first", None, ("gpt", "Hello!"), ("human", "Can fish breathe in water?"), ("gpt", "Yes.")),
    ],
    "lvis": [_row("asked-twice", "gif_named.jpg", _QUESTION, ("human", "Please tell me."), _ANSWER)],
    "lrv": [],
}
