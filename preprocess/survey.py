"""A look at the data before any work: how many rows, where their pictures lie, and whether a few of them decode."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from preprocess import images
from preprocess.mix import Mix
from preprocess.pictures import PictureStore
from preprocess.rejects import Rejected
from preprocess.worklist import Worklist

MOST_PICTURES, MOST_FOLDERS = 200, 12


class Survey:
    """Takes the worklist as a file would, and remembers one picture of each batch of dialogues."""

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def write(self, batch: bytes) -> None:
        dialogue = json.loads(batch[: batch.index(b"\n")])
        if dialogue["picture"] is not None:
            self.pictures.append(dialogue["picture"])

    def report(self, mix: Mix, work: Worklist, store: PictureStore) -> Iterator[str]:
        """Lines for people; nothing is raised for what is missing."""
        rejects = Counter(reject.source for reject in work.rejects)
        for source in mix.sources:
            name = source.name
            yield f"{name}: {work.rows[name]} rows, {rejects[name]} rejected before their pictures are looked at"
            for folder, rows in work.folders[name].most_common(MOST_FOLDERS):
                place = "" if store.has_folder(folder) else " – MISSING"
                yield f"    {folder}: pictures of {rows} rows{place}"
            if len(work.folders[name]) > MOST_FOLDERS:
                yield f"    and {len(work.folders[name]) - MOST_FOLDERS} more folders"
        yield from self._looked_at(store)

    def _looked_at(self, store: PictureStore) -> Iterator[str]:
        step = -(-len(self.pictures) // MOST_PICTURES) or 1
        chosen = self.pictures[::step]
        reasons: dict[str, list[str]] = {}
        for picture in chosen:
            try:
                images.decode_rgb(store.read(picture))
            except Rejected as error:  # noqa: PERF203
                reasons.setdefault(error.reason, []).append(picture)
        yield f"{len(chosen)} pictures looked at, {sum(map(len, reasons.values()))} of them bad"
        for reason, bad in reasons.items():
            yield f"    {reason}: {len(bad)}, for one {bad[0]}"
