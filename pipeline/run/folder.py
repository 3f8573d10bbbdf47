"""The run folder: claimed by one training at a time, and left with a word on how it ended."""

from __future__ import annotations

import errno
import fcntl
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.run.control import Control
from preprocess.atomic import write_json


class RunFolder:
    """One start in a run folder. Every rank has one; only the main rank's writes.

    Raises: UserError if the folder cannot be written, or another process trains there.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.folder = Path(recipe.run.dir)
        self.control = Control(self.folder)
        # The step; None until the folder's checkpoints were found to be this training's.
        self.begun_at: int | None = None
        # There from the claim to the first step; empty, or with a word on how the start ended before that.
        self.starting = self.folder / "control/starting"
        self.alive = self.folder / "control/alive"
        if ranks.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = _claim(self.folder / ".lock")
                self.control.clear()
                self.starting.write_text("")
            except OSError as error:
                raise UserError(f"run.dir: {self.folder}: cannot be written ({error}); give one that you own") from None

    def begin(self, step: int, weights: dict[str, Any]) -> None:
        """The start was accepted: from here on the folder tells of it, and what an earlier start told is over."""
        self.begun_at = step
        if self.ranks.is_main:
            (self.folder / "outcome.json").unlink(missing_ok=True)
            self.starting.unlink(missing_ok=True)
            write_json(self.folder / "recipe.json", asdict(self.recipe))
            if not self.weights_file.exists():
                write_json(self.weights_file, weights)

    def end(self, outcome: str, step: int | None, reason: str = "") -> None:
        """Leave `outcome.json`: "done", "stopped", "failed" or "lost", and from which step this start went on.

        The reason of a stop is who asked for it.
        """
        if self.begun_at is not None:
            facts = {"outcome": outcome, "step": step, "from_step": self.begun_at, "reason": reason}
            write_json(self.folder / "outcome.json", facts)
        elif outcome == "failed":  # refused: the folder is as it was before
            self.starting.unlink(missing_ok=True)
        else:
            self.record_failed_start(f"{outcome}: {reason}")

    def record_failed_start(self, word: str) -> None:
        """The start ended before its first step. The first rank's word counts: the others' ends come of it."""
        if self.starting.exists() and not self.starting.stat().st_size:
            self.starting.write_text(word + "\n", encoding="utf-8")

    def beat(self) -> None:
        """A sign of life, since a first step, a save or an evaluation tells of itself only when it is over.

        Not before the start is accepted: one that is refused must not make a dead run look alive.
        """
        if self.ranks.is_main and self.begun_at is not None:
            self.alive.touch()

    @property
    def weights_file(self) -> Path:
        """What was loaded when the run began; a resumed one takes its weights from the checkpoint."""
        return self.folder / "weights.json"


def _claim(path: Path) -> IO[str]:
    """Hold the lock until this process ends, however it ends. A file system without locks is trusted."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise UserError(f"run.dir: {path.parent}: another process trains here; stop it, or give another") from None
    return file
