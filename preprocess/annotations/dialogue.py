"""Rows of the three source formats become dialogues, or are rejected with a reason. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from preprocess.annotations.mix import Source
from preprocess.prompts import IMAGE_TOKEN
from preprocess.rejects import Rejected

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")

_UNWANTED = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    speaker: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers in turn, the first a question and the last an answer. `picture` is relative to the root."""

    source: str
    row: int
    id: str
    picture: str | None
    turns: tuple[Turn, ...]


def to_dialogue(source: Source, row: int, value: Any) -> Dialogue:
    """Raises: Rejected."""
    if not isinstance(value, dict):
        raise Rejected("not_an_object", f"found {_kind(value)}")
    picture, said = _READERS[source.format](value)
    turns = _in_order(said)
    if picture is None and any(IMAGE_TOKEN in turn.text for turn in turns):
        raise Rejected("image_token_without_picture", "the text holds <image>, the row no picture")
    path = None if picture is None else picture_path(source.images, picture)
    return Dialogue(source.name, row, row_id(source, row, value), path, turns)


def row_id(source: Source, row: int, value: Any) -> str:
    """The row's own id, which need not be unique, or one made of its place."""
    key = "image_id" if source.format == "lrv" else "id"
    found = value.get("id", value.get(key)) if isinstance(value, dict) else None
    usable = isinstance(found, str | int) and not isinstance(found, bool) and found != ""
    return clean_text(str(found)) if usable else f"{source.name}-{row}"


def clean_text(text: str) -> str:
    """Without NUL; lone surrogates, which are no characters, become U+FFFD."""
    return _UNWANTED.sub(lambda found: "" if found[0] == "\x00" else "\ufffd", text)


def picture_path(prefix: str, picture: str) -> str:
    """Raises: Rejected if the path is absolute or climbs out of its folder."""
    path = PurePosixPath(picture.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", picture):
        raise Rejected("picture_path_escapes", repr(picture))
    if _UNWANTED.search(picture):
        raise Rejected("picture_path_invalid", repr(picture))
    return str(PurePosixPath(prefix, path))


def _llava(row: dict[str, Any]) -> tuple[str | None, list[Turn]]:
    conversation = _get(row, "conversations", list)
    if not conversation:
        raise Rejected("empty_conversation", "conversations is []")
    return _picture(row.get("image")), [_turn(turn) for turn in conversation]


def _lrv(row: dict[str, Any]) -> tuple[str | None, list[Turn]]:
    name = str(_get(row, "image_id", str, int))
    if PurePosixPath(name).suffix.lower() not in PICTURE_SUFFIXES:
        name += ".jpg"
    question, answer = (_get(row, key, str, int, float) for key in ("question", "answer"))
    return name, [Turn("human", clean_text(str(question))), Turn("gpt", clean_text(str(answer)))]


_READERS: dict[str, Callable[[dict[str, Any]], tuple[str | None, list[Turn]]]] = {
    "llava": _llava,
    "lvis": _llava,
    "lrv": _lrv,
}


def _turn(value: Any) -> Turn:
    if not isinstance(value, dict):
        raise Rejected("wrong_type", f"a turn is {_kind(value)}, expected an object")
    speaker = _get(value, "from", str)
    text = clean_text(_get(value, "value", str))
    if speaker not in SPEAKERS:
        raise Rejected("unknown_speaker", f"from is {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    return Turn(SPEAKERS[speaker], text)  # type: ignore[arg-type]


def _picture(value: Any) -> str | None:
    """None, "" and [] mean a row without picture, as a missing key does."""
    if isinstance(value, list):
        if len(value) > 1:
            raise Rejected("several_pictures", f"image is a list of {len(value)}")
        value = value[0] if value else None
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Rejected("wrong_type", f"image is {_kind(value)}, expected a string")
    return value


def _in_order(turns: list[Turn]) -> tuple[Turn, ...]:
    """Strictly question, answer, question, answer …: turns of one speaker in a row are joined by a newline,
    answers to nothing are dropped at the start and unanswered questions at the end."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].speaker == turn.speaker:
            joined[-1] = Turn(turn.speaker, f"{joined[-1].text}\n{turn.text}")
        else:
            joined.append(turn)
    start = 1 if joined[0].speaker == "gpt" else 0
    end = len(joined) - 1 if joined[-1].speaker == "human" else len(joined)
    if end - start < 2:
        raise Rejected("no_answer", f"{len(turns)} turns, none of them an answer to a question")
    return tuple(joined[start:end])


def _get(row: dict[str, Any], key: str, *kinds: type) -> Any:
    if key not in row:
        raise Rejected("missing_key", f"no {key!r} among {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise Rejected("wrong_type", f"{key} is {_kind(value)}, expected {' or '.join(map(_name, kinds))}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else _name(type(value))


def _name(kind: type) -> str:
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(kind, kind.__name__)
