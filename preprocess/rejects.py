"""Reject reasons, the format of rejects.jsonl, and the limit on rejects per source (see docs/data-cleaning.md)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import ExitCode, UserError

REASONS = {
    "broken_json": "the line is not valid JSON",
    "not_an_object": "the row is not a JSON object",
    "missing_key": "the row lacks a key that its format requires",
    "wrong_type": "a value has a type that the format does not allow",
    "empty_conversation": "the conversation has no turns",
    "unknown_speaker": "a turn is from neither the human nor the model",
    "no_answer": "no question is followed by an answer",
    "no_supervised_token": "the token limit cuts off every answer",
    "image_token_without_picture": "the text contains <image>, but the row has no image",
    "other_media": "the row refers to an image, video or audio in a way that is not supported",
    "several_pictures": "the row has more than one image",
    "picture_path_escapes": "the image path is absolute, or leaves its folder through '..' or a link",
    "picture_path_invalid": "the image path is not a valid file name",
    "picture_missing": "the image file does not exist",
    "picture_unreadable": "permission to read the image file is denied",
    "picture_empty": "the image file is empty",
    "picture_unknown_format": "the file is not in a supported image format",
    "picture_truncated": "the image file is truncated",
    "picture_corrupt": "the image cannot be decoded",
    "picture_too_large": "the image has too many pixels, or its file too many bytes",
    "picture_unsupported_pixels": "the pixel type has no defined black and white (floating point or 32-bit integers)",
}


class Rejected(Exception):  # noqa: N818  bad input data is not a program error
    """Raised for a row that cannot become a sample because its data is bad, so retrying does not help."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejected, (self.reason, self.detail)


MAX_DETAIL_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One line of rejects.jsonl. `row` counts the source's rows from 0, after its limit and weight are applied."""

    source: str
    row: int
    id: str
    reason: str
    detail: str

    @classmethod
    def from_error(cls, error: Rejected, *, source: str, row: int, id: str) -> Reject:  # noqa: A002
        return cls(source=source, row=row, id=id, reason=error.reason, detail=error.detail[:MAX_DETAIL_CHARACTERS])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_line(self) -> bytes:
        return json.dumps(self.to_json()).encode() + b"\n"


def read_rejects(path: Path) -> Iterator[Reject]:
    """Stream the rejects of a rejects.jsonl file."""
    with path.open("rb") as lines:
        yield from (Reject(**json.loads(line)) for line in lines)


RejectCounts = Counter[tuple[str, str]]  # (source, reason) -> number of rows


class TooManyRejectsError(UserError):
    """Raised when a source loses more of its rows than `--max-reject-ratio` allows."""

    exit_code = ExitCode.FAILED


def count_rejects(path: Path) -> RejectCounts:
    """Count the rejects of a rejects.jsonl file by source and reason."""
    return Counter((reject.source, reject.reason) for reject in read_rejects(path))


def count_by_source(rejects: RejectCounts) -> Counter[str]:
    return _sum_over(rejects, part=0)


def count_by_reason(rejects: RejectCounts) -> Counter[str]:
    return _sum_over(rejects, part=1)


def _sum_over(rejects: RejectCounts, *, part: int) -> Counter[str]:
    sums = Counter[str]()
    for kind, count in rejects.items():
        sums[kind[part]] += count
    return sums


def summary_lines(rejects: RejectCounts) -> Iterator[str]:
    """Yield one line for each source and reason with the number of rejected rows."""
    for (source, reason), count in sorted(rejects.items()):
        yield f"  rejected {count:>7}  {source}: {reason}"


def sources_over_limit(rejects: RejectCounts, rows: Mapping[str, int], max_ratio: float) -> str:
    """Describe the sources that lost more than `max_ratio` of their rows. Return "" if there are none."""
    return ", ".join(
        f"{name} {count / rows[name]:.2%} ({count} of {rows[name]} rows)"
        for name, count in count_by_source(rejects).items()
        if count > max_ratio * rows[name]
    )
