"""A look at the data before any work: how many rows, where their pictures lie, and whether a few of them decode."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from preprocess.annotations.mix import Mix
from preprocess.annotations.worklist import Worklist
from preprocess.images import codec
from preprocess.images.store import ImageStore
from preprocess.rejects import Rejected, count_by_source

LEAST_PICTURES, MOST_FOLDERS = 50, 12  # of each source; less than twice as many pictures are looked at


class _Spread:
    """Every n-th of what it is given, with n doubled whenever that gets too many."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self._met, self._step = 0, 1

    def offer(self, picture: str) -> None:
        if self._met % self._step == 0:
            self.taken.append(picture)
        self._met += 1
        if len(self.taken) == 2 * LEAST_PICTURES:
            self.taken, self._step = self.taken[::2], 2 * self._step


class Survey:
    """Takes the worklist as a file would, and remembers pictures from all over each source."""

    def __init__(self) -> None:
        self.pictures: dict[str, _Spread] = defaultdict(_Spread)

    def write(self, batch: bytes) -> None:
        for line in batch.splitlines():
            dialogue = json.loads(line)
            if dialogue["picture"] is not None:
                self.pictures[dialogue["source"]].offer(dialogue["picture"])

    def report(self, mix: Mix, work: Worklist, store: ImageStore) -> Iterator[str]:
        """Lines for people; nothing is raised for what is missing."""
        rejects = count_by_source(work.rejects)
        for source in mix.sources:
            name = source.name
            yield f"{name}: {work.rows[name]} rows, {rejects[name]} rejected before their pictures are looked at"
            for folder, rows in work.folders[name].most_common(MOST_FOLDERS):
                place = "" if store.has_folder(folder) else " – MISSING"
                yield f"    {folder}: pictures of {rows} rows{place}"
            if len(work.folders[name]) > MOST_FOLDERS:
                yield f"    and {len(work.folders[name]) - MOST_FOLDERS} more folders"
            yield from _looked_at(self.pictures[name].taken, store)


def _looked_at(pictures: Sequence[str], store: ImageStore) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for picture in pictures:
        try:
            codec.decode_rgb(store.read(picture))
        except Rejected as error:  # noqa: PERF203
            reasons.setdefault(error.reason, []).append(picture)
    yield f"    {len(pictures)} pictures looked at, {sum(map(len, reasons.values()))} of them bad"
    for reason, bad in reasons.items():
        yield f"        {reason}: {len(bad)}, for one {bad[0]}"
