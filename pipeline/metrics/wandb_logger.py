"""Weights & Biases, offline or online: one wandb run per run folder, however often it is resumed.

Whatever ails it, the training does not depend on it; metrics.jsonl is the record.
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

# The helper process that wandb starts dies of a preemption's SIGTERM, while we go on to save and stop.
HELPERS = 3  # that may be lost before we go on without
FINISH_S = 60.0  # for its last words: without a network they would take until the job's time limit
SENT_AGAIN = 256  # lines: the last ones of a helper that died may not be written; wandb takes no step twice


class WandbRun:
    """A wandb run that is opened again if its helper process dies."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.run.dir)
        self.sent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=SENT_AGAIN)
        self.lost = 0
        self.run: Any = None
        self._try(self._open)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        self.sent.append((step, {key: value for key, value in values.items() if value is not None}))
        self._try(lambda: self.run.log(self.sent[-1][1], step=step))

    def finish(self, exit_code: int) -> None:
        if self.run is None:
            return
        last_words = threading.Thread(
            target=lambda: self._try(lambda: self.run.finish(exit_code=exit_code)), daemon=True
        )
        last_words.start()
        last_words.join(FINISH_S)
        if last_words.is_alive():
            unsent = f"not all was sent within {FINISH_S:.0f} s; `wandb sync {self.folder}/wandb/run-*` sends the rest"
            print(f"wandb: {unsent}", flush=True)
            atexit.register(_leave)  # before what wandb registered, which would wait for the same

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

    def _try(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except ConnectionError as error:
            self.lost += 1
            self._give_up(error) if self.lost > HELPERS else self._try(self._open_again)
        except Exception as error:
            self._give_up(error)

    def _open_again(self) -> None:
        """With a new helper. The old one's goodbye is an error, and its address must not be found."""
        import wandb

        with contextlib.suppress(ConnectionError):
            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
        self._open()
        for step, values in self.sent:
            self.run.log(values, step=step)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb: {error}; going on without it", flush=True)
        self.run = None


def _leave() -> None:
    """End this process with the exit code that it would have had."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if hasattr(sys, "last_value") else 0)
