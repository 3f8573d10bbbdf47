"""Requests from outside: a file appears in the run folder, the ranks agree, and the run does it.

A batch script or a person touches `control/stop` or `control/save`. A file survives what a signal does not: launchers,
loader processes and wandb's helper would all receive the signal too, and die of it.
"""

from __future__ import annotations

from pathlib import Path


class Control:
    """The request files of one run folder."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "control"

    def clear(self) -> None:
        """Forget requests that an earlier job answered, or that nobody was there to answer. Main rank only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done("stop")
        self.done("save")

    def requests(self) -> tuple[bool, bool]:
        """(stop, save) as this rank sees them."""
        return (self.folder / "stop").exists(), (self.folder / "save").exists()

    def done(self, request: str) -> None:
        (self.folder / request).unlink(missing_ok=True)
