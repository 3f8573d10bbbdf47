"""Annotation formats (llava, lvis, lrv), and the conversion of annotation rows into dialogues.

To add a format, write a parser for its rows, and add its name to `Format` and `FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from preprocess.annotations.other_media import find_reference
from preprocess.images.codec import IMAGE_SUFFIXES
from preprocess.prompts import IMAGE_TOKEN, NUL_OR_SURROGATE, clean_text
from preprocess.rejects import Rejected
from preprocess.remote_path import with_slashes

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

Format = Literal["llava", "lvis", "lrv"]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    speaker: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A dialogue whose turns alternate between questions and answers, from a question at the start to a final answer.

    Attributes:
        source: Name of the source in the mix.
        row: Number of the row, counted from 0 after the source's limit and weight are applied.
        id: The row's own id, which need not be unique, or SOURCE-ROW if the row has no id.
        image: Path of the image below the root of the raw data, or None for a text-only dialogue.
    """

    source: str
    row: int
    id: str
    image: str | None
    turns: tuple[Turn, ...]


# -- Formats ---------------------------------------------------------------------------------------------------------


def _parse_llava(row: Row) -> tuple[str | None, list[Turn]]:
    conversation = _get(row, "conversations", list)
    if not conversation:
        raise Rejected("empty_conversation", "conversations is []")
    return _image_name(row.get("image")), [_parse_turn(turn) for turn in conversation]


def _parse_lrv(row: Row) -> tuple[str | None, list[Turn]]:
    name = str(_get(row, "image_id", str, int))
    if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
        name += ".jpg"
    question, answer = (clean_text(str(_get(row, key, str, int, float))) for key in ("question", "answer"))
    return name, [Turn(speaker="human", text=question), Turn(speaker="gpt", text=answer)]


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """An annotation format.

    Attributes:
        parse: Function that returns the image name (None for text-only rows) and the turns, or raises `Rejected`.
        id_key: Key that holds the row's id if the row has no "id".
    """

    parse: Callable[[Row], tuple[str | None, list[Turn]]]
    id_key: str = "id"


FORMATS: dict[Format, RowFormat] = {
    "llava": RowFormat(parse=_parse_llava),
    "lvis": RowFormat(parse=_parse_llava),
    "lrv": RowFormat(parse=_parse_lrv, id_key="image_id"),
}


# -- Rows to dialogues -----------------------------------------------------------------------------------------------


def to_dialogue(value: Any, *, source: str, row: int, row_format: Format, image_folder: str) -> Dialogue:
    """Convert the JSON value of a row into a dialogue, and repair the order of its turns.

    Args:
        image_folder: Folder of the source's images, relative to the root of the raw data.

    Raises:
        Rejected: If the row cannot become a sample.
    """
    if not isinstance(value, dict):
        raise Rejected("not_an_object", f"found {_type_name(value)}")
    name, turns = FORMATS[row_format].parse(value)
    turns = _alternate(turns)
    if name is None and any(IMAGE_TOKEN in turn.text for turn in turns):
        raise Rejected("image_token_without_picture", "the text holds <image>, the row no picture")
    if name is None and (reference := find_reference(value, [turn.text for turn in turns])):
        raise Rejected("other_media", reference)
    image = None if name is None else image_path(image_folder, name)
    dialogue_id = row_id(value, source=source, row=row, row_format=row_format)
    return Dialogue(source=source, row=row, id=dialogue_id, image=image, turns=tuple(turns))


def row_id(value: Any, *, source: str, row: int, row_format: Format) -> str:
    """Return the row's own id, which need not be unique, or SOURCE-ROW if the row has no id."""
    own = value.get("id", value.get(FORMATS[row_format].id_key)) if isinstance(value, dict) else None
    usable = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    return clean_text(str(own)) if usable else f"{source}-{row}"


def image_path(folder: str, name: str) -> str:
    """Return `folder/name` with forward slashes. Raises: Rejected if the name is absolute or contains ".."."""
    path = PurePosixPath(with_slashes(name))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise Rejected("picture_path_escapes", repr(name))
    if NUL_OR_SURROGATE.search(name):
        raise Rejected("picture_path_invalid", repr(name))
    return str(PurePosixPath(with_slashes(folder), path))


def _parse_turn(value: Any) -> Turn:
    if not isinstance(value, dict):
        raise Rejected("wrong_type", f"a turn is {_type_name(value)}, expected an object")
    speaker = _get(value, "from", str)
    text = clean_text(_get(value, "value", str))
    if speaker not in SPEAKERS:
        raise Rejected("unknown_speaker", f"from is {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    return Turn(speaker=SPEAKERS[speaker], text=text)  # type: ignore[arg-type]


def _image_name(value: Any) -> str | None:
    """Return the image name of an `image` value. None, "" and [] mean that the row has no image."""
    if isinstance(value, list):
        if len(value) > 1:
            raise Rejected("several_pictures", f"image is a list of {len(value)}")
        value = value[0] if value else None
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Rejected("wrong_type", f"image is {_type_name(value)}, expected a string")
    return value


def _alternate(turns: list[Turn]) -> list[Turn]:
    """Make the turns alternate between question and answer.

    Consecutive turns of one speaker are joined by a newline. An answer at the start and a question at the end are
    dropped. Raises: Rejected if no answered question is left.
    """
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].speaker == turn.speaker:
            joined[-1] = Turn(speaker=turn.speaker, text=f"{joined[-1].text}\n{turn.text}")
        else:
            joined.append(turn)
    start = 1 if joined[0].speaker == "gpt" else 0
    end = len(joined) - 1 if joined[-1].speaker == "human" else len(joined)
    if end - start < 2:
        raise Rejected("no_answer", f"{len(turns)} turns, none of them an answer to a question")
    return joined[start:end]


def _get(row: Row, key: str, *types: type) -> Any:
    """Return `row[key]`. Raises: Rejected if the key is missing, or the value has none of the given types."""
    if key not in row:
        raise Rejected("missing_key", f"no {key!r} among {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(map(_json_name, types))
        raise Rejected("wrong_type", f"{key} is {_type_name(value)}, expected {expected}")
    return value


def _type_name(value: Any) -> str:
    return "null" if value is None else _json_name(type(value))


def _json_name(python_type: type) -> str:
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(python_type, python_type.__name__)
