"""`Survey`: the report of `build_shards.py --check` about rows, image folders and a sample of the images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from preprocess.annotations.mix import Mix
from preprocess.annotations.worklist import Worklist
from preprocess.images import codec
from preprocess.images.store import ImageStore
from preprocess.rejects import Rejected, count_by_source

MIN_IMAGES = 50  # a survey decodes 50 to 99 images of each source, or all images if there are fewer
MAX_FOLDERS = 12  # number of folders that are listed per source


class _EvenSample:
    """Evenly spaced items of a stream of unknown length.

    Every n-th item is kept. Whenever there are too many, every second kept item is dropped and n doubles.
    """

    def __init__(self) -> None:
        self.items: list[str] = []
        self._count, self._step = 0, 1

    def offer(self, item: str) -> None:
        if self._count % self._step == 0:
            self.items.append(item)
        self._count += 1
        if len(self.items) == 2 * MIN_IMAGES:
            self.items, self._step = self.items[::2], 2 * self._step


class Survey:
    """A file-like sink for the worklist that keeps a sample of each source's images."""

    def __init__(self) -> None:
        self.images: dict[str, _EvenSample] = defaultdict(_EvenSample)

    def write(self, batch: bytes) -> None:
        for line in batch.splitlines():
            dialogue = json.loads(line)
            if dialogue["picture"] is not None:
                self.images[dialogue["source"]].offer(dialogue["picture"])

    def report(self, mix: Mix, work: Worklist, store: ImageStore) -> Iterator[str]:
        """Yield the lines of the report. Missing folders and bad images are reported without raising an error."""
        rejects = count_by_source(work.rejects)
        for source in mix.sources:
            name = source.name
            yield f"{name}: {work.rows[name]} rows, {rejects[name]} rejected before any image is read"
            for folder, rows in work.folders[name].most_common(MAX_FOLDERS):
                missing = "" if store.has_folder(folder) else " – MISSING"
                yield f"    {folder}: images of {rows} rows{missing}"
            if len(work.folders[name]) > MAX_FOLDERS:
                yield f"    and {len(work.folders[name]) - MAX_FOLDERS} more folders"
            yield from _decode_report(self.images[name].items, store)


def _decode_report(images: Sequence[str], store: ImageStore) -> Iterator[str]:
    bad: dict[str, list[str]] = {}
    for image in images:
        try:
            codec.decode_rgb(store.read(image))
        except Rejected as error:  # noqa: PERF203
            bad.setdefault(error.reason, []).append(image)
    yield f"    {len(images)} images decoded, {sum(map(len, bad.values()))} of them bad"
    for reason, paths in bad.items():
        yield f"        {reason}: {len(paths)}, for example {paths[0]}"
