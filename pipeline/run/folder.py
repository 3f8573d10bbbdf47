"""The run folder: a lock that prevents two simultaneous launches in it, and the heartbeat and outcome files."""

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
    """One launch of a run, and its files in the run folder. Only the main rank locks and prepares the folder.

    Raises: UserError if the folder cannot be written, or if another process trains in it.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks):
        self.recipe, self.ranks = recipe, ranks
        self.folder = Path(recipe.run.dir)
        self.control = Control(self.folder)
        self.first_step: int | None = None  # step from which this launch trains; None until `accept_start`
        # This file exists during start-up, until `accept_start`. It is empty unless start-up fails; then it holds the
        # reason.
        self.starting_file = self.folder / "control/starting"
        self.heartbeat_file = self.folder / "control/alive"
        if ranks.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = _lock(self.folder / ".lock")
                self.control.clear_unanswered()
                self.starting_file.write_text("")
            except OSError as error:
                raise UserError(
                    f"run.dir: {self.folder}: cannot be written ({error}). Give a folder that you own."
                ) from None

    @property
    def weights_file(self) -> Path:
        """Record of the weights that the first launch of the run loaded. Later launches load a checkpoint instead."""
        return self.folder / "weights.json"

    def accept_start(self, step: int, loaded: dict[str, Any]) -> None:
        """Record that start-up succeeded and training begins. Call this after the checkpoint, if any, is loaded.

        Args:
            step: Number of steps already done.
            loaded: Sources of the weights; only the first launch of a run records them.
        """
        self.first_step = step
        if self.ranks.is_main:
            (self.folder / "outcome.json").unlink(missing_ok=True)
            self.starting_file.unlink(missing_ok=True)
            write_json(self.folder / "recipe.json", asdict(self.recipe))
            if not self.weights_file.exists():
                write_json(self.weights_file, loaded)

    def heartbeat(self) -> None:
        """Touch the heartbeat file, since the log can be silent for long during a first step, a save or a validation.

        Do nothing before `accept_start`, because a launch that is refused must not make a dead run look alive.
        """
        if self.ranks.is_main and self.first_step is not None:
            self.heartbeat_file.touch()

    def write_outcome(self, outcome: str, *, step: int | None = None, reason: str = "") -> None:
        """Write `outcome.json`, which the batch script and `pipeline.status` read.

        Before `accept_start`, the outcome of the previous launch is kept, and only `control/starting` changes.

        Args:
            outcome: "done", "stopped", "failed" or "lost".
            step: Number of steps done, if known.
            reason: The error; for a stop, who requested it.
        """
        if self.first_step is not None:
            facts = {"outcome": outcome, "step": step, "from_step": self.first_step, "reason": reason}
            write_json(self.folder / "outcome.json", facts)
        elif outcome == "failed":  # a refused launch leaves the folder unchanged
            self.starting_file.unlink(missing_ok=True)
        else:
            self.record_failed_start(f"{outcome}: {reason}")

    def record_failed_start(self, reason: str) -> None:
        """Record why this launch ended before its first step.

        Only the reason of the first rank to fail is kept, because the other ranks fail as a consequence.
        """
        if self.starting_file.exists() and not self.starting_file.stat().st_size:
            self.starting_file.write_text(reason + "\n", encoding="utf-8", errors="backslashreplace")


def _lock(path: Path) -> IO[str]:
    """Lock a file until this process ends or is killed. On a file system without locks, do nothing."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise UserError(
                f"run.dir: {path.parent}: another process trains here. Stop it, or give another run.dir."
            ) from None
    return file
