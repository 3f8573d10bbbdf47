"""Requests to stop or to save a run: files in the run folder's `control/`, and signals.

A person or the batch script creates `control/stop` or `control/save`. The script writes the name of the signal that it
received into the file. It does not forward the signal itself, because launchers, DataLoader workers and wandb's helper
process would receive it too, and exit.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Literal

# Variable that the batch script sets to its job id. SLURM_JOB_ID would not do, because any shell inside an allocation
# has it.
BATCH_SCRIPT = "EMMA_JOB"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Control:
    """The request files of one run folder, as one rank sees them."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "control"
        self.signal_name = ""  # first signal that this rank received
        self._signal_numbers = -1  # pipe to which Python writes the number of each signal when the signal arrives

    def clear_unanswered(self) -> None:
        """Remove the requests that an earlier launch left unanswered. Main rank only.

        In a batch job the requests are kept, because the batch script removes old requests itself, and may have written
        a new one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if BATCH_SCRIPT not in os.environ:
            self.clear("stop")
            self.clear("save")

    def clear(self, request: Literal["stop", "save"]) -> None:
        (self.folder / request).unlink(missing_ok=True)

    def stop_on_signals(self) -> None:
        """Treat SIGTERM and SIGUSR1 as requests to stop.

        A preemption with grace time, and `scancel --signal=USR1` without --batch, signal the ranks but not the batch
        script. No file is created for a signal, because a launcher also sends SIGTERM when another rank has died, and
        the file would look like a stop requested by hand.
        """
        self._signal_numbers, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember_signal)

    def _remember_signal(self, number: int, _: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def received_signal(self) -> str:
        """Return the name of the first signal that requested a stop, or "".

        Another thread can call this while the main thread waits in compiled code, which delays the signal handlers.
        """
        with contextlib.suppress(OSError):  # no signal has arrived, or `stop_on_signals` was not called
            for number in os.read(self._signal_numbers, 4096):
                if number in STOP_SIGNALS:
                    self._remember_signal(number, None)
        return self.signal_name

    def stop_requested(self) -> bool:
        return bool(self.signal_name) or (self.folder / "stop").exists()

    def save_requested(self) -> bool:
        return (self.folder / "save").exists()

    def stop_reason(self) -> str:
        """Return who requested the stop: "by hand", or "by SIG…" for a signal to the batch script or to this rank."""
        try:
            requester = (self.folder / "stop").read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            requester = self.signal_name or "SIGTERM"
        return f"by {requester}" if requester.startswith("SIG") else "by hand"

    def record_refusal(self, reason: str) -> None:
        """Record for the batch script, if there is one, that the same command would be refused again.

        The script cannot rely on the exit code, because the launcher may kill this rank before it exits. The line names
        the job, because another job may be training in the same folder and was not refused.
        """
        job = os.environ.get(BATCH_SCRIPT)
        if job and self.folder.is_dir():
            with (self.folder / "refused").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{job}\t{reason}\n")
