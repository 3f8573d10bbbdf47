"""The metrics logger: writes each log line to the console, to `metrics.jsonl` and to wandb.

To add a metric:

- a value of one step: add its key in `MetricsLogger.log_step`;
- a value over all steps since the last line: sum it in `Window.add`, add its key in `Window.close` (window.py);
- a value that every rank contributes to: carry it in `StepReport` first (pipeline/step.py).

Then document the key in docs/metrics.md; a test compares that table with the keys that a run writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.errors import convert_oserrors
from pipeline.flops import GIB
from pipeline.metrics.history import SLOW_RANK_RATIO, finite, seconds_left
from pipeline.metrics.throughput import peak_flops_of_ranks
from pipeline.metrics.timers import StartupTimer
from pipeline.metrics.wandb_logger import WandbLogger
from pipeline.metrics.window import Window
from pipeline.recipe import Recipe
from pipeline.step import StepReport
from preprocess.progress import format_duration

MAX_CONSOLE_VALUE = 60  # characters; the console line of an event leaves out longer values


class MetricsLogger:
    """Log a run's steps and events. Every rank calls the methods; only the main rank writes.

    A context manager: it opens `metrics.jsonl` and the wandb run, and closes both at the end.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, data: TrainData):
        self.recipe, self.ranks, self.data = recipe, ranks, data
        self.path = Path(recipe.run.dir) / "metrics.jsonl"
        self.wandb: WandbLogger | None = None

    def __enter__(self) -> MetricsLogger:
        if self.ranks.is_main:
            self.file = _open_for_lines(self.path)
            self.window = Window(self.recipe, self.data.sources.names, peak_flops=peak_flops_of_ranks(self.ranks))
            if self.recipe.log.wandb != "off":
                self.wandb = WandbLogger(self.recipe)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ranks.is_main:
            try:
                with convert_oserrors(self.path):
                    self.file.close()
            finally:
                if self.wandb is not None:
                    self.wandb.finish(exit_code=0 if error is None else 1)

    def log_start(self, step: int, startup: StartupTimer, notes: list[str]) -> None:
        """Log that the training loop begins: a `resume` event if steps were done before, otherwise `start`."""
        if not self.ranks.is_main:
            return
        self._write(
            {
                "event": "resume" if step else "start",
                "step": step,
                "time": time.time(),
                "world_size": self.ranks.world_size,
                "total_steps": self.data.total_steps,
                "settings": self.recipe.memory_settings(),
                "began": startup.began,
                "start_s": startup.seconds,
                "notes": notes,
            }
        )
        for note in notes:
            print(note, flush=True)
        print(f"{'resumed' if step else 'started'} at step {step} of {self.data.total_steps}, {startup}", flush=True)
        self.first_step, self.excluded_s = step, 0.0
        self.window.restart()

    def log_step(self, step: int, batch: GlobalBatch, report: StepReport, lr: float) -> None:
        """Add one step to the window, and write a line if one is due.

        A line is due every `log.every_steps`, at the last step, and whenever the run may end after this step: on a
        request to stop or save, and after a loss or gradient that is not finite.

        Args:
            step: number of optimizer steps done, this one included.
        """
        if not self.ranks.is_main:
            return
        self.window.add(batch, report)
        may_end = report.requests.stop or report.requests.save or not report.finite
        if step % self.recipe.log.every_steps and step != self.data.total_steps and not may_end:
            return
        values = {
            "step": step,
            "epoch": round(step / self.data.plan.steps_per_epoch, 4),
            "loss/total": report.total,
            "loss/text": report.text,
            "loss/align": report.align,
            "optim/lr": lr,
            "optim/grad_norm": report.grad_norm,
            **self.window.close(),
            "memory/peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            "time": time.time(),
        }
        self._write(values)
        print(self._console_line(values), flush=True)
        if self.wandb is not None:
            self.wandb.log(step, values)

    def log_validation(self, step: int, losses: dict[str, Any], *, seconds: float) -> None:
        """Log a validation as a `heldout` event and in wandb."""
        self.log_event("heldout", step, **losses, seconds=round(seconds, 2))
        if self.wandb is not None:
            # wandb accepts each step once, so a validation that the previous launch missed is logged at the next step.
            self.wandb.log(max(step, self.first_step + 1), losses)

    def log_drawing(self, step: int, path: Path, *, seconds: float) -> None:
        """Log a drawing of held-out images as an `images` event, and the image in wandb. Main rank only."""
        self.log_event("images", step, path=path.relative_to(self.path.parent).as_posix(), seconds=round(seconds, 2))
        if self.wandb is not None:
            self.wandb.log_image(step, "heldout/images", path)

    def log_event(self, name: str, step: int, **facts: Any) -> None:
        """Log an event, such as a save or a spike, to `metrics.jsonl` and the console."""
        if self.ranks.is_main:
            print(f"{name} at step {step}{_console_facts(facts)}", flush=True)
            self._write({"event": name, "step": step, "time": time.time(), **facts})

    @contextmanager
    def exclude_time(self, name: str) -> Iterator[None]:
        """Exclude this block, a save or a validation, from the step time. The caller logs its event."""
        begun = time.monotonic()
        yield
        if self.ranks.is_main:
            seconds = time.monotonic() - begun
            self.window.exclude(name, seconds)
            self.excluded_s += seconds

    def _console_line(self, values: dict[str, Any]) -> str:
        step, total_steps = values["step"], self.data.total_steps
        left_s = seconds_left(
            steps=total_steps - step,
            step_s=values["time/step_s"],
            paused_s=self.excluded_s,
            steps_done=step - self.first_step,
        )
        align = "   -  " if values["loss/align"] is None else f"{values['loss/align']:.4f}"
        mfu = "" if values["speed/mfu"] is None else f"  mfu {values['speed/mfu']:.1%}"
        memory = f"  {values['memory/peak_gib']:.1f} GiB" if values["memory/peak_gib"] else ""
        gc = f"  gc {values['time/gc_s']:.2f}s" if values["time/gc_s"] >= 0.01 * values["time/step_s"] else ""
        ratio = values["ranks/slowest_ratio"] or 1.0
        slow = f"  rank {values['ranks/slowest']} ×{ratio:.2f}" if ratio >= SLOW_RANK_RATIO else ""
        return (
            f"step {step:>6}/{total_steps}  text {values['loss/text']:.4f}  align {align}"
            f"  lr {values['optim/lr']:.2e}  |g| {values['optim/grad_norm']:.3f}"
            f"  {values['speed/samples_per_s']:.1f} samples/s  {values['speed/tokens_per_s']:.0f} tok/s{mfu}"
            f"  pad {values['data/padding_ratio']:.1%}  wait {values['time/data_wait_s']:.3f}s{gc}{slow}{memory}"
            f"  left {format_duration(left_s)}"
        )

    def _write(self, values: dict[str, Any]) -> None:
        with convert_oserrors(self.path):
            self.file.write(_json_line(values))


def append_event(folder: Path, name: str, step: int | None, **facts: Any) -> None:
    """Append an event to a run folder's `metrics.jsonl`, from any rank and without a `MetricsLogger`."""
    with _open_for_lines(folder / "metrics.jsonl") as file:
        file.write(_json_line({"event": name, "step": step, "time": time.time(), **facts}))


def _console_facts(facts: dict[str, Any]) -> str:
    texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in facts.items()}
    shown = {key.rpartition("heldout/")[2]: text for key, text in texts.items() if len(text) <= MAX_CONSOLE_VALUE}
    return "".join(f"  {key} {text}" for key, text in shown.items())


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(finite(values)) + "\n"


def _open_for_lines(path: Path) -> TextIO:
    """Open a file to append lines. If a kill cut its last line off, end that line first."""
    with path.open("ab+") as file:
        is_cut_off = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        if is_cut_off:
            file.write(b"\n")
    return path.open("a", encoding="utf-8", buffering=1)
