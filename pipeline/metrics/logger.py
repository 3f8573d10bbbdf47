"""What a run reports: a console line, a line of `metrics.jsonl`, wandb. docs/metrics.md lists the keys."""

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

from pipeline.data.loader import GlobalBatch, TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.errors import convert_oserrors
from pipeline.flops import GIB
from pipeline.metrics.history import SLOW_RANK, finite, hours, seconds_left
from pipeline.metrics.throughput import peak_of_ranks
from pipeline.metrics.timers import StartUp
from pipeline.metrics.wandb_logger import WandbRun
from pipeline.metrics.window import Window
from pipeline.recipe import Recipe
from pipeline.run.out_of_memory import memory_settings
from pipeline.step import StepReport

LONG = 60  # characters of a fact; a longer one is not for the console


class Metrics:
    """Context manager; only the main rank writes."""

    def __init__(self, recipe: Recipe, ranks: Ranks, data: TrainData):
        self.recipe, self.ranks, self.data = recipe, ranks, data
        self.path = Path(recipe.run.dir) / "metrics.jsonl"
        self.wandb: WandbRun | None = None

    def __enter__(self) -> Metrics:
        if self.ranks.is_main:
            self.file = _open_for_lines(self.path)
            self.window = Window(self.recipe, self.data.sources.names, peak_of_ranks(self.ranks))
            if self.recipe.log.wandb != "off":
                self.wandb = WandbRun(self.recipe)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ranks.is_main:
            try:
                with convert_oserrors(self.path):
                    self.file.close()
            finally:
                if self.wandb is not None:
                    self.wandb.finish(exit_code=0 if error is None else 1)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Mark a stop, save, done or warning in the JSONL and on the console."""
        if self.ranks.is_main:
            print(f"{name} at step {step}{_told(facts)}", flush=True)
            self._write({"event": name, "step": step, "time": time.time(), **facts})

    @contextmanager
    def pause(self, name: str, step: int) -> Iterator[dict[str, Any]]:
        """An evaluation, which is no step's time: an event with its seconds and the given facts."""
        begun, facts = time.monotonic(), dict[str, Any]()
        with self.stalled(name):
            yield facts
        self.event(name, step, **facts, seconds=round(time.monotonic() - begun, 2))

    @contextmanager
    def stalled(self, name: str) -> Iterator[None]:
        """Time that is no step's, of which an event will tell later."""
        begun = time.monotonic()
        yield
        if self.ranks.is_main:
            self.window.pause(name, time.monotonic() - begun)
            self.paused_s += time.monotonic() - begun

    def started(self, step: int, start: StartUp, notes: list[str]) -> None:
        """Mark the start of the loop; it continues if steps are done already."""
        if not self.ranks.is_main:
            return
        sizes = {"world_size": self.ranks.world_size, "total_steps": self.data.total_steps}
        settings = memory_settings(self.recipe)
        facts = {**sizes, "settings": settings, "began": start.began, "start_s": start.seconds, "notes": notes}
        self._write({"event": "resume" if step else "start", "step": step, "time": time.time(), **facts})
        for note in notes:
            print(note, flush=True)
        print(f"{'resumed' if step else 'started'} at step {step} of {self.data.total_steps}, {start}", flush=True)
        self.first_step, self.paused_s = step, 0.0
        self.window.restart()

    def log(self, step: int, batch: GlobalBatch, report: StepReport, lr: float) -> None:
        """Note one step; every `log.every_steps`, and before a stop, write a line. `step` counts the steps done."""
        if not self.ranks.is_main:
            return
        self.window.add(batch, report)
        waits = report.stop or report.save or not report.finite  # it may be the last word for long, or for ever
        if step % self.recipe.log.every_steps and step != self.data.total_steps and not waits:
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
        print(self._line(values), flush=True)
        self._to_wandb(step, values)

    def log_heldout(self, step: int, values: dict[str, Any]) -> None:
        """The losses of an evaluation; its event has them too."""
        if self.ranks.is_main:
            # wandb takes no step twice: one that a start makes up for goes with that start's first step.
            self._to_wandb(max(step, self.first_step + 1), values)

    def _line(self, values: dict[str, Any]) -> str:
        align = "   -  " if values["loss/align"] is None else f"{values['loss/align']:.4f}"
        mfu = "" if values["speed/mfu"] is None else f"  mfu {values['speed/mfu']:.1%}"
        memory = f"  {values['memory/peak_gib']:.1f} GiB" if values["memory/peak_gib"] else ""
        gc = f"  gc {values['time/gc_s']:.2f}s" if values["time/gc_s"] >= 0.01 * values["time/step_s"] else ""
        ratio = values["ranks/slowest_ratio"] or 1.0
        slow = f"  rank {values['ranks/slowest']} ×{ratio:.2f}" if ratio >= SLOW_RANK else ""
        return (
            f"step {values['step']:>6}/{self.data.total_steps}  text {values['loss/text']:.4f}  align {align}"
            f"  lr {values['optim/lr']:.2e}  |g| {values['optim/grad_norm']:.3f}"
            f"  {values['speed/samples_per_s']:.1f} samples/s  {values['speed/tokens_per_s']:.0f} tok/s{mfu}"
            f"  pad {values['data/padding_ratio']:.1%}  wait {values['time/data_wait_s']:.3f}s{gc}{slow}{memory}"
            f"  left {hours(self._seconds_left(values['step'], values['time/step_s']))}"
        )

    def _seconds_left(self, step: int, step_s: float) -> float:
        return seconds_left(self.data.total_steps - step, step_s, self.paused_s, step - self.first_step)

    def _write(self, values: dict[str, Any]) -> None:
        with convert_oserrors(self.path):
            self.file.write(_json_line(values))

    def _to_wandb(self, step: int, values: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.log(step, values)


def _told(facts: dict[str, Any]) -> str:
    """For the console: what is short enough."""
    words = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in facts.items()}
    return "".join(f"  {key.rpartition('heldout/')[2]} {word}" for key, word in words.items() if len(word) <= LONG)


def append_event(folder: Path, name: str, step: int | None, **facts: Any) -> None:
    """Mark an event in a run folder's JSONL from outside of the main rank's loop; any rank may."""
    with _open_for_lines(folder / "metrics.jsonl") as file:
        file.write(_json_line({"event": name, "step": step, "time": time.time(), **facts}))


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(finite(values)) + "\n"


def _open_for_lines(path: Path) -> TextIO:
    """To append lines, after one that a kill may have cut off."""
    with path.open("ab+") as file:
        cut_off = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        if cut_off:
            file.write(b"\n")
    return path.open("a", encoding="utf-8", buffering=1)
