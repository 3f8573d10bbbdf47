"""The worklist: every dialogue of a mix as one line of JSON, cut into ranges. One shard is built from each range.

Each input row becomes a line of the worklist or a reject. Equal input gives equal bytes, so the sha256 of a range shows
whether the shard that was built from this range is still valid.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError
from preprocess.annotations.dialogue import Dialogue, row_id, to_dialogue
from preprocess.annotations.mix import Mix, Source
from preprocess.annotations.other_media import has_mention
from preprocess.annotations.reader import read_rows
from preprocess.images.store import ImageStore
from preprocess.rejects import Reject, RejectCounts, Rejected
from preprocess.remote_path import AnyPath, find_file

ROWS_PER_PROGRESS_CALL = 1000
MAX_FOLDERS_IN_MESSAGE = 5


@dataclass(frozen=True, kw_only=True)
class DialogueRange:
    """The part of the worklist that one shard is built from.

    Attributes:
        first: Index in the worklist of the range's first dialogue.
        count: Number of dialogues.
        offset: Position in the worklist of the range's first byte.
        size: Number of bytes.
        sha256: Hash of these bytes.
    """

    first: int
    count: int
    offset: int
    size: int
    sha256: str


@dataclass(kw_only=True)
class Worklist:
    """The ranges of a worklist, and counts by source.

    Attributes:
        rows: Number of rows of each source after its limit and weight are applied.
        rows_read: Number of rows read from the annotation file of each source. A limit can leave rows unread.
        rejects: Number of rejected rows by source and reason.
        folders: For each source, the number of rows by image folder.
        mentions: Number of text-only rows of each source that contain a tag such as <video>.
    """

    ranges: list[DialogueRange] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    rows_read: Counter[str] = field(default_factory=Counter)
    rejects: RejectCounts = field(default_factory=Counter)
    folders: dict[str, Counter[str]] = field(default_factory=dict)
    mentions: Counter[str] = field(default_factory=Counter)

    @property
    def dialogues(self) -> int:
        return sum(part.count for part in self.ranges)


def make_worklist(
    mix: Mix,
    root: AnyPath,
    *,
    samples_per_shard: int,
    write: Callable[[bytes], Any],
    on_rows: Callable[[int], None],
    write_reject: Callable[[bytes], Any] = lambda line: None,
) -> Worklist:
    """Convert every source of the mix into dialogues, and pass them to `write`.

    At most the dialogues of one shard are in memory.

    Args:
        write: Called once per range, with the lines of the range.
        on_rows: Called once per thousand rows of a source, with the number of rows of all sources so far.
        write_reject: Called for each rejected row, with its line of rejects.jsonl.

    Raises:
        UserError: If an annotation file cannot be read.
    """
    work = Worklist()
    lines = _lines(mix, root, work, on_rows, write_reject)
    first = offset = 0
    while batch := list(itertools.islice(lines, samples_per_shard)):
        data = b"".join(batch)
        write(data)
        digest = hashlib.sha256(data).hexdigest()
        work.ranges.append(DialogueRange(first=first, count=len(batch), offset=offset, size=len(data), sha256=digest))
        first, offset = first + len(batch), offset + len(data)
    return work


def _lines(
    mix: Mix, root: AnyPath, work: Worklist, on_rows: Callable[[int], None], write_reject: Callable[[bytes], Any]
) -> Iterator[bytes]:
    for source in mix.sources:
        name = source.name
        work.rows[name] = 0
        folders = work.folders[name] = Counter()
        for row, value in enumerate(_weighted_rows(source, root, work)):
            work.rows[name] += 1
            if row % ROWS_PER_PROGRESS_CALL == 0:
                on_rows(work.rows.total())
            try:
                if isinstance(value, Rejected):
                    raise value
                dialogue = to_dialogue(
                    value, source=name, row=row, row_format=source.format, image_folder=source.images
                )
            except Rejected as error:
                work.rejects[name, error.reason] += 1
                id_ = row_id(value, source=name, row=row, row_format=source.format)
                write_reject(Reject.from_error(error, source=name, row=row, id=id_).to_line())
                continue
            if dialogue.image:
                folders[dialogue.image.rpartition("/")[0] or "."] += 1
            elif has_mention(turn.text for turn in dialogue.turns):
                work.mentions[name] += 1
            yield _to_line(dialogue)


def _weighted_rows(source: Source, root: AnyPath, work: Worklist) -> Iterator[Any | Rejected]:
    """Yield the rows of a source after applying its limit and weight.

    Copies of a row follow each other directly, so that their image is decoded only once.
    """
    for row, value in enumerate(itertools.islice(read_rows(find_file(root, source.annotations)), source.limit)):
        work.rows_read[source.name] += 1
        yield from itertools.repeat(value, source.times(row))


def _to_line(dialogue: Dialogue) -> bytes:
    line = {
        "source": dialogue.source,
        "row": dialogue.row,
        "id": dialogue.id,
        "picture": dialogue.image,  # part of the range's sha256: renaming the key would invalidate every shard
        "conversations": [{"from": turn.speaker, "value": turn.text} for turn in dialogue.turns],
    }
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def check_feasible(work: Worklist, store: ImageStore, max_reject_ratio: float) -> None:
    """Raise UserError if the mix has no rows, or if missing image folders alone exceed the reject limit."""
    if not work.rows.total():
        raise UserError("the mix's annotation files have no rows: there is nothing to build")
    for source, folders in work.folders.items():
        missing = Counter({folder: rows for folder, rows in folders.items() if not store.has_folder(folder)})
        if missing.total() > max_reject_ratio * work.rows[source]:
            listed = ", ".join(f"{name} ({rows} rows)" for name, rows in missing.most_common(MAX_FOLDERS_IN_MESSAGE))
            rest = len(missing) - MAX_FOLDERS_IN_MESSAGE
            more = f" and {rest} more" if rest > 0 else ""
            raise UserError(
                f"source {source!r}: image folders are missing under {store.root}: {listed}{more}. Add each folder "
                "NAME or its archive NAME.zip or NAME.tar, or correct `images` in the mix"
            )


def notes(mix: Mix, work: Worklist) -> Iterator[str]:
    """Yield the notes about unexpected numbers of rows, and about rows that may refer to images or videos."""
    yield from _row_count_notes(mix, work)
    for source, rows in work.mentions.items():
        yield (
            f"note: source {source!r}: {rows} text-only rows contain a tag such as <video>, [IMG] or <img src>; "
            "they are kept as text"
        )


def _row_count_notes(mix: Mix, work: Worklist) -> Iterator[str]:
    """Yield a note for each source whose number of rows differs from the number that the mix expects.

    If a limit left rows unread, the total is unknown. Such a source gets a note only if it has too many rows already.
    """
    complete = {
        source.name for source in mix.sources if source.limit is None or work.rows_read[source.name] < source.limit
    }
    for source in mix.sources:
        yield from _shortage_notes(source, work)
        if source.expected_rows is not None:
            subject = f"source {source.name!r} has"
            yield from _expectation_note(subject, [source.name], source.expected_rows, work, complete)
    for expected in mix.expected:
        subject = f"sources {', '.join(expected.sources)} together have"
        yield from _expectation_note(subject, expected.sources, expected.rows, work, complete)


def _shortage_notes(source: Source, work: Worklist) -> Iterator[str]:
    read = work.rows_read[source.name]
    if not read:
        yield f"note: source {source.name!r} has no rows, so it adds nothing"
    elif not work.rows[source.name]:
        yield f"note: source {source.name!r} adds nothing: weight {source.weight} leaves none of its {read} rows"
    if source.limit is not None and 0 < read < source.limit:
        yield f"note: source {source.name!r} has {read} rows, fewer than its limit of {source.limit}"


def _expectation_note(
    subject: str, names: Collection[str], expected: int, work: Worklist, complete: set[str]
) -> Iterator[str]:
    """Yield a note if the sources have more rows than expected, or fewer although all files were read to the end."""
    rows, all_read = sum(work.rows_read[name] for name in names), complete.issuperset(names)
    if rows > expected or (all_read and rows < expected):
        yield f"note: {subject} {'' if all_read else 'at least '}{rows} rows, the mix expects {expected}"
