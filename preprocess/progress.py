"""`Progress` of a build: a bar on a terminal or a line every ten seconds in a log, and progress.json for programs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, TextIO

from preprocess.atomic import canonical_json, publish
from preprocess.shards.folder import ShardFolder

LOG_EVERY_S, TERMINAL_EVERY_S, FILE_EVERY_S = 10.0, 0.2, 5.0
BAR_CHARACTERS = 30


class Progress:
    """Progress of a build, counted in dialogues.

    Args:
        folder: folder in which progress.json is written; None: it is not written.
        total: number of dialogues of the whole set.
        reused: number of dialogues of shards that are reused. They count as done, but not towards the rate.
        rejects: number of rejects known at the start, by source.
        stream: stream to which the bar or the lines are printed.
    """

    def __init__(
        self,
        folder: ShardFolder | None,
        total: int,
        *,
        reused: int = 0,
        rejects: Mapping[str, int] | None = None,
        stream: TextIO = sys.stdout,
    ) -> None:
        self.path = folder.progress if folder else None
        self.total, self.reused, self.stream = total, reused, stream
        self.done, self.rejects = reused, Counter(rejects)
        self.started = time.monotonic()
        self.terminal = stream.isatty()
        self._printed = self._written = float("-inf")

    def add(self, dialogues: int, rejects: dict[str, int]) -> None:
        self.done += dialogues
        self.rejects.update(rejects)

    def tick(self, state: str = "building", *, last: bool = False) -> None:
        """Print the progress and write progress.json, if enough time has passed. Call this at least once per second."""
        now = time.monotonic()
        if self.path and (last or now - self._written >= FILE_EVERY_S):
            self._written = now
            publish(self.path, canonical_json(self.report(state)))
        if last or now - self._printed >= (TERMINAL_EVERY_S if self.terminal else LOG_EVERY_S):
            self._printed = now
            self._show(last=last)

    def metrics(self) -> dict[str, float]:
        """Return the values that Ray exports to a monitoring system."""
        report = self.report("")
        return {
            "dialogues_done": self.done,
            "dialogues_per_s": report["dialogues_per_s"],
            "rejects": self.rejects.total(),
            "seconds_left": report["left_s"] or 0.0,
        }

    def report(self, state: str) -> dict[str, Any]:
        """Return the content of progress.json."""
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.reused) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else None
        return {
            "state": state,
            "dialogues": {"done": self.done, "total": self.total, "reused": self.reused},
            "rejects": dict(self.rejects),
            "dialogues_per_s": round(rate, 1),
            "elapsed_s": round(elapsed, 1),
            "left_s": None if left is None else round(left, 1),
        }

    def _show(self, *, last: bool) -> None:
        report = self.report("")
        share = self.done / self.total if self.total else 1.0
        left = "?" if report["left_s"] is None else format_duration(report["left_s"])
        line = (
            f"{self.done}/{self.total} dialogues ({share:.0%})  {report['dialogues_per_s']}/s  "
            f"{self.rejects.total()} rejected  {left} left"
        )
        if self.terminal:
            filled = round(share * BAR_CHARACTERS)
            print(f"\r{'█' * filled}{'·' * (BAR_CHARACTERS - filled)} {line}\033[K", end="", file=self.stream)
            print(end="\n" if last else "", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
