"""Weights & Biases logging: one wandb run per run folder, for all its launches, online or offline.

If wandb fails, the training continues, because `metrics.jsonl` has all metrics.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe

# SLURM's SIGTERM on preemption kills wandb's helper process, while the training goes on to save a checkpoint.
MAX_HELPER_DEATHS = 3  # after more deaths than this, the training continues without wandb
FINISH_S = 60.0  # limit for the upload at the end; without network access, wandb would try until the job's time limit
RESENT_LINES = 256  # a helper that dies may not have written its last lines; wandb ignores steps that it already has


class WandbLogger:
    """Log to wandb, and reopen the run if wandb's helper process dies."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.run.dir)
        self.sent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=RESENT_LINES)
        self.helper_deaths = 0
        self.run: Any = None
        self._try(self._open)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values that are not None. wandb ignores a step that it already has."""
        if self.run is None:
            return
        self.sent.append((step, {key: value for key, value in values.items() if value is not None}))
        self._try(lambda: self.run.log(self.sent[-1][1], step=step))

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Log an image file under `key`."""
        if self.run is None:
            return
        import wandb

        self.log(step, {key: wandb.Image(str(path))})

    def finish(self, exit_code: int) -> None:
        """Close the run. Wait for the upload for at most `FINISH_S`."""
        if self.run is None:
            return
        upload = threading.Thread(target=lambda: self._try(lambda: self.run.finish(exit_code=exit_code)), daemon=True)
        upload.start()
        upload.join(FINISH_S)
        if upload.is_alive():
            print(
                f"wandb: the upload did not finish within {FINISH_S:.0f} s; "
                f"run `wandb sync {self.folder}/wandb/run-*` to upload the rest",
                flush=True,
            )
            # Exit handlers run in reverse order, so `_exit_now` runs before wandb's, which waits for the upload.
            atexit.register(_exit_now)

    def _open(self) -> None:
        import wandb

        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=self.recipe.log.project,
            name=self.folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode="offline" if self.recipe.log.wandb == "offline" else "online",
            dir=str(self.folder),
            config=asdict(self.recipe),
            settings=wandb.Settings(silent=True),
        )

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except ConnectionError as error:
            self.helper_deaths += 1
            self._give_up(error) if self.helper_deaths > MAX_HELPER_DEATHS else self._try(self._reopen)
        except Exception as error:
            self._give_up(error)

    def _reopen(self) -> None:
        """Open the run with a new helper process, and send it the last lines again."""
        import wandb

        with contextlib.suppress(ConnectionError):  # raised because the old helper does not answer
            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)  # the address of the old helper
        self._open()
        for step, values in self.sent:
            self.run.log(values, step=step)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb: {error}; the training continues without it", flush=True)
        self.run = None


def _exit_now() -> None:
    """End this process at once, with its usual exit code: 1 after an uncaught exception, otherwise 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if hasattr(sys, "last_value") else 0)
