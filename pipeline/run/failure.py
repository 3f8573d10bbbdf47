"""Exit of a training process after an error: one line on stderr, an outcome in the run folder, and an exit code.

    UserError        2   an error that the user can fix; not requeued
    DivergedError    3   the loss diverged; not requeued
    RetryableError   4   the same command may succeed on a retry; requeued
    anything else    1   a bug (`CRASHED`), printed with its traceback; requeued

If another rank dies or hangs, `pipeline.run.watchdog` ends this one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from model.errors import CommandError, ExitCode, UserError, first_line, name_encoding_error
from pipeline.data.shard_reader import DamagedShardError
from pipeline.data.workers import worker_death
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CRASHED, RetryableError, from_oserror
from pipeline.metrics.logger import append_event
from pipeline.recipe import Recipe
from pipeline.run.control import Control
from pipeline.run.folder import RunFolder

MAIN_RANK_FIRST_S = 10.0  # delay of the other ranks, so that the main rank reports an error that all ranks raised


class DivergedError(CommandError):
    """No finite loss or gradient for several steps; the same command would fail again at the same step."""

    exit_code = ExitCode.FAILED


def exit_after(error: Exception, recipe: Recipe | None, ranks: Ranks | None, run: RunFolder | None) -> NoReturn:
    """End this process after an error. `recipe`, `ranks` and `run` are None if they were not built yet."""
    if isinstance(error, OSError) and error.filename and isinstance(known := from_oserror(error), UserError):
        error = known
    elif isinstance(error, UnicodeEncodeError):
        error = name_encoding_error(error) or error
    elif ranks and isinstance(error, RuntimeError) and (lost := worker_death(error, ranks)):
        error = lost
    if isinstance(error, CommandError):
        _exit_with_message(error, recipe, run)
    _exit_with_traceback(error, run)


def _exit_with_message(error: CommandError, recipe: Recipe | None, run: RunFolder | None) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise here if a DataLoader worker ended
    is_main = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    if not (is_main or isinstance(error, (DamagedShardError, RetryableError))):
        # The main rank has raised the same error. The launcher kills all ranks once one exits, so let it exit first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(MAIN_RANK_FIRST_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # the disk may be what failed
        _record(str(error), recipe, run, "lost" if error.exit_code == ExitCode.RETRY else "failed")
    # Skip exit handlers, because they would wait for other ranks, which may be waiting in a collective for this one.
    os._exit(error.exit_code)


def _record(reason: str, recipe: Recipe | None, run: RunFolder | None, outcome: str) -> None:
    """Write the outcome to the run folder. If training had not begun, report the refusal to the batch script too."""
    if run is not None:
        run.write_outcome(outcome, reason=reason)
        if run.first_step is not None:
            append_event(run.folder, outcome, None, reason=reason)
    if outcome == "failed" and recipe is not None and (run is None or run.first_step is None):
        Control(Path(recipe.run.dir)).record_refusal(reason)


def _exit_with_traceback(error: Exception, run: RunFolder | None) -> NoReturn:
    traceback.print_exception(error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(OSError):
        if run is not None and run.first_step is not None:
            append_event(run.folder, "failed", None, reason=reason)
        elif run is not None:
            run.record_failed_start(f"failed: {reason}")
    os._exit(CRASHED)
