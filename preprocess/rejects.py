"""Why an input row can end without becoming a sample. docs/data-cleaning.md tells the whole story, repairs included."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError

REASONS = {
    "broken_json": "the line is not JSON",
    "not_an_object": "the row is not a JSON object",
    "missing_key": "a key that its format needs is not there",
    "wrong_type": "a value has a type that its format does not allow",
    "empty_conversation": "the conversation has no turns",
    "unknown_speaker": "a turn is neither the human's nor the model's",
    "no_answer": "no question is followed by an answer",
    "no_supervised_token": "the limit of text tokens cuts every answer off",
    "image_token_without_picture": "the text speaks of a picture that the row does not have",
    "several_pictures": "the row has more than one picture",
    "picture_path_escapes": "the picture's path is absolute, or leaves its folder through '..' or a link",
    "picture_path_invalid": "the picture's path cannot be the name of a file",
    "picture_missing": "there is no such file",
    "picture_unreadable": "the file may not be read",
    "picture_empty": "the file has no bytes",
    "picture_unknown_format": "the bytes are none of the picture formats that are read",
    "picture_truncated": "the file ends before the picture does",
    "picture_corrupt": "the picture cannot be decoded",
    "picture_too_large": "the picture has more pixels, or its file more bytes, than are decoded",
    "picture_unsupported_pixels": "the pixels have no meaning as colours between black and white",
}


class Rejected(Exception):  # noqa: N818  it is no error of the program
    """Raised for a row that cannot become a sample; it is bad data, so nothing is retried."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejected, (self.reason, self.detail)


@dataclass(frozen=True)
class Reject:
    """One line of rejects.jsonl. `row` counts from 0 over the source's rows as its weight thins or repeats them."""

    source: str
    row: int
    id: str
    reason: str
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_line(self) -> bytes:
        return json.dumps(self.to_json()).encode() + b"\n"


def read_rejects(path: Path) -> Iterator[Reject]:
    with path.open("rb") as lines:
        yield from (Reject(**json.loads(line)) for line in lines)


RejectCounts = Counter[tuple[str, str]]  # by source and reason


class TooManyRejectsError(UserError):
    """A source lost more of its rows than `--max-reject-ratio` allows."""


def count_rejects(path: Path) -> RejectCounts:
    return Counter((reject.source, reject.reason) for reject in read_rejects(path))


def by_source(rejects: RejectCounts) -> Counter[str]:
    return _sums(rejects, 0)


def by_reason(rejects: RejectCounts) -> Counter[str]:
    return _sums(rejects, 1)


def _sums(rejects: RejectCounts, part: int) -> Counter[str]:
    sums = Counter[str]()
    for kind, count in rejects.items():
        sums[kind[part]] += count
    return sums


def reject_lines(rejects: RejectCounts) -> Iterator[str]:
    """The summary: one line for each reason of each source."""
    for (source, reason), count in sorted(rejects.items()):
        yield f"  rejected {count:>7}  {source}: {reason}"


def sources_over_limit(rejects: RejectCounts, rows: Mapping[str, int], most: float) -> str:
    """The sources that lost more than `most` of their rows, with how many; empty if none did."""
    lost = by_source(rejects)
    return ", ".join(
        f"{name} {count / rows[name]:.2%} ({count} of {rows[name]} rows)"
        for name, count in lost.items()
        if count > most * rows[name]
    )
