"""Requests from outside: a file appears in the run folder, the ranks agree, and the run does it.

A batch script or a person makes `control/stop` or `control/save`; the script writes into it which signal it got. A file
survives what a signal does not: launchers, loader processes and wandb's helper would all receive the signal too, and
die of it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

BATCH_SCRIPT = "EMMA_JOB"  # the job that it runs in; SLURM_JOB_ID is there in a shell in an allocation too


class Control:
    """The request files of one run folder."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "control"
        self.signalled = ""

    def clear(self) -> None:
        """Forget requests that nobody was there to answer. Main rank only.

        The batch script has done so, before it passed the first signal on; that one must stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if BATCH_SCRIPT not in os.environ:
            self.done("stop")
            self.done("save")

    def stop_on_signals(self) -> None:
        """Take some signals for a request to stop.

        A preemption with grace time, and `scancel --signal=USR1` without --batch, tell the ranks, and nobody else.
        They leave no file: the launcher sends SIGTERM too, when another rank has died, which is not a stop by hand.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self.signalled = self.signalled or signal.Signals(number).name

    def refuse(self, reason: str) -> None:
        """Tell the batch script that the same command would be refused again. Nobody else waits for it.

        It cannot go by the exit code: the launcher kills the ranks that end a moment after the first one. The line has
        the job's name, because another job may train in this folder, and that one was not refused.
        """
        job = os.environ.get(BATCH_SCRIPT)
        if job and self.folder.is_dir():
            with (self.folder / "refused").open("a", encoding="utf-8") as file:
                file.write(f"{job}\t{reason}\n")

    def who_asked_to_stop(self) -> str:
        """Who asked for the stop that was agreed on: "by hand", or a signal to the batch script or to us: "by SIG…"."""
        try:
            told = (self.folder / "stop").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            told = self.signalled or "SIGTERM"
        return f"by {told}" if told.startswith("SIG") else "by hand"

    def requests(self) -> tuple[bool, bool]:
        """(stop, save) as this rank sees them."""
        return bool(self.signalled) or (self.folder / "stop").exists(), (self.folder / "save").exists()

    def done(self, request: str) -> None:
        (self.folder / request).unlink(missing_ok=True)
