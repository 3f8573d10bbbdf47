"""How many rows a source may lose, and what is said of those that it lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from model.errors import UserError
from preprocess.rejects import read_rejects

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


def lost_too_many(rejects: RejectCounts, rows: Mapping[str, int], most: float) -> str:
    """The sources that lost more than `most` of their rows, with how many; empty if none did."""
    lost = by_source(rejects)
    return ", ".join(
        f"{name} {count / rows[name]:.2%} ({count} of {rows[name]} rows)"
        for name, count in lost.items()
        if count > most * rows[name]
    )
