"""Annotation files become one list of dialogues on disk, cut into fixed ranges: one range, one shard, one task.

Every input row ends here either as a line of the list or as a reject. The list is the same for the same input, so a
range's hash says whether the shard that was built from it still stands.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError
from preprocess.annotations.dialogue import Dialogue, row_id, to_dialogue
from preprocess.annotations.mix import Mix, Source
from preprocess.annotations.reader import read_rows
from preprocess.images.store import ImageStore
from preprocess.rejects import Reject, RejectCounts, Rejected
from preprocess.remote_path import Place

DETAIL_CHARACTERS = 300


@dataclass(frozen=True)
class Range:
    """Bytes of the list that one shard is built from; `first` counts its first dialogue over the whole list."""

    first: int
    count: int
    offset: int
    size: int
    sha256: str


@dataclass
class Worklist:
    """`rows`, `read` and `folders` (of pictures, with the rows that need them) are kept by source.

    rows   those that the limit and the weight leave
    read   those of the file: all of them, unless the limit ended it
    """

    ranges: list[Range] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    rejects: RejectCounts = field(default_factory=Counter)
    folders: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def dialogues(self) -> int:
        return sum(part.count for part in self.ranges)


def make_worklist(
    mix: Mix,
    root: Place,
    samples_per_shard: int,
    write: Callable[[bytes], Any],
    tick: Callable[[int], None],
    write_reject: Callable[[bytes], Any] = lambda line: None,
) -> Worklist:
    """Streams every source through `write`, and the lines of rows that are rejected already through `write_reject`.

    `tick` is told the number of rows read, now and then.
    """
    work = Worklist()
    lines = _lines(mix, root, work, tick, write_reject)
    first = offset = 0
    while batch := list(itertools.islice(lines, samples_per_shard)):
        data = b"".join(batch)
        write(data)
        work.ranges.append(Range(first, len(batch), offset, len(data), hashlib.sha256(data).hexdigest()))
        first, offset = first + len(batch), offset + len(data)
    return work


def _lines(
    mix: Mix, root: Place, work: Worklist, tick: Callable[[int], None], write_reject: Callable[[bytes], Any]
) -> Iterator[bytes]:
    for source in mix.sources:
        work.rows[source.name] = 0
        folders = work.folders[source.name] = Counter()
        for row, value in enumerate(_weighted_rows(source, root, work)):
            work.rows[source.name] += 1
            if row % 1000 == 0:
                tick(work.rows.total())
            try:
                if isinstance(value, Rejected):
                    raise value
                dialogue = to_dialogue(source, row, value)
            except Rejected as error:
                work.rejects[source.name, error.reason] += 1
                write_reject(reject(source.name, row, row_id(source, row, value), error).to_line())
                continue
            if dialogue.picture:
                folders[dialogue.picture.rpartition("/")[0] or "."] += 1
            yield to_line(dialogue)


def _weighted_rows(source: Source, root: Place, work: Worklist) -> Iterator[Any | Rejected]:
    """A row's repetitions stand together, so that its picture is decoded once."""
    for row, value in enumerate(itertools.islice(read_rows(root / source.annotations), source.limit)):
        work.read[source.name] += 1
        yield from itertools.repeat(value, source.times(row))


def reject(source: str, row: int, id: str, error: Rejected) -> Reject:  # noqa: A002
    return Reject(source, row, id, error.reason, error.detail[:DETAIL_CHARACTERS])


def to_line(dialogue: Dialogue) -> bytes:
    line = {
        "source": dialogue.source,
        "row": dialogue.row,
        "id": dialogue.id,
        "picture": dialogue.picture,
        "conversations": [{"from": turn.speaker, "value": turn.text} for turn in dialogue.turns],
    }
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def check_feasible(work: Worklist, store: ImageStore, max_reject_ratio: float) -> None:
    """Raises: UserError if there are no rows, or missing folders would cost more of them than may be lost."""
    if not work.rows.total():
        raise UserError("the mix's annotation files have no rows: there is nothing to build")
    for source, folders in work.folders.items():
        missing = {folder: rows for folder, rows in folders.items() if not store.has_folder(folder)}
        if sum(missing.values()) > max_reject_ratio * work.rows[source]:
            listed = ", ".join(f"{folder} ({rows} rows)" for folder, rows in Counter(missing).most_common(5))
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UserError(
                f"source {source!r}: picture folders are missing under {store.root}: {listed}{more}; put them there, "
                "as folders or as archives beside their place (NAME.zip, NAME.tar), or mend `images` in the mix"
            )


def row_count_notes(mix: Mix, work: Worklist) -> Iterator[str]:
    """One line for each number of rows that is not what the mix expects, as far as a limit lets it be known."""
    known = {source.name for source in mix.sources if source.limit is None or work.read[source.name] < source.limit}
    for source in mix.sources:
        yield from _shortage_notes(source, work)
        if source.expected_rows is not None:
            yield from _expected_note(f"source {source.name!r} has", [source.name], source.expected_rows, work, known)
    for expected in mix.expected:
        who = f"sources {', '.join(expected.sources)} together have"
        yield from _expected_note(who, expected.sources, expected.rows, work, known)


def _shortage_notes(source: Source, work: Worklist) -> Iterator[str]:
    read = work.read[source.name]
    if not read:
        yield f"note: source {source.name!r} has no rows: it adds nothing"
    elif not work.rows[source.name]:
        yield f"note: source {source.name!r} adds nothing: weight {source.weight} leaves none of its {read} rows"
    if source.limit is not None and 0 < read < source.limit:
        yield f"note: source {source.name!r} has {read} rows, fewer than its limit of {source.limit}"


def _expected_note(who: str, names: list[str], expected: int, work: Worklist, known: set[str]) -> Iterator[str]:
    """A file that its limit cut short has at least so many rows."""
    found, whole = sum(work.read[name] for name in names), known.issuperset(names)
    if found > expected or (whole and found < expected):
        yield f"note: {who} {'' if whole else 'at least '}{found} rows, the mix expects {expected}"
