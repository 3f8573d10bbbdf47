"""What a run reports: a console line, a line of `metrics.jsonl`, wandb. docs/metrics.md lists the keys.

A wandb that fails never takes the training down; the JSONL is the record.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from pipeline.data import GlobalBatch
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.step import StepReport

GIB = 1 << 30


class Metrics:
    """Context manager; only the main rank writes. `total_steps` is for the progress and the time left."""

    def __init__(self, recipe: Recipe, ranks: Ranks, total_steps: int):
        self.recipe, self.ranks, self.total_steps = recipe, ranks, total_steps
        self.folder = Path(recipe.run.dir)
        self.window = _Window()
        self.wandb: Any = None

    def __enter__(self) -> Metrics:
        if self.ranks.is_main:
            self.file = _open_for_lines(self.folder / "metrics.jsonl")
            if self.recipe.log.wandb != "off":
                self.wandb = _open_wandb(self.recipe, self.folder)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ranks.is_main:
            self.file.close()
            if self.wandb is not None:
                self._ask_wandb(lambda: self.wandb.finish(exit_code=0 if error is None else 1, quiet=True))

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Mark a start, resume, stop, save, done or warning in the JSONL and on the console."""
        if self.ranks.is_main:
            details = "".join(f"  {key} {value}" for key, value in facts.items())
            print(f"{name} at step {step}{details}", flush=True)
            self._write({"event": name, "step": step, "time": time.time(), **facts})

    def started(self, step: int, began: float, notes: list[str]) -> None:
        """Mark the start of the loop, by a process that began at `began`; it continues if steps are done already."""
        for note in notes if self.ranks.is_main else ():
            print(note, flush=True)
        facts = {"world_size": self.ranks.world_size, "total_steps": self.total_steps, "began": began, "notes": notes}
        if self.ranks.is_main:
            self._write({"event": "resume" if step else "start", "step": step, "time": time.time(), **facts})
            print(f"{'resumed' if step else 'started'} at step {step} of {self.total_steps}", flush=True)
        self.window = _Window()

    def log(self, step: int, epoch: float, batch: GlobalBatch, report: StepReport, lr: float) -> None:
        """Note one step; every `log.every_steps` write a line. `step` counts the steps done, this one included."""
        if not self.ranks.is_main:
            return
        self.window.add(batch)
        if step % self.recipe.log.every_steps and step != self.total_steps:
            return
        speeds = self.window.close()
        values = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss/total": report.total,
            "loss/text": report.text,
            "loss/align": report.align,
            "optim/lr": lr,
            "optim/grad_norm": report.grad_norm,
            **speeds,
            "memory/peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            "time": time.time(),
        }
        self._write(values)
        print(self._line(values), flush=True)
        self._to_wandb(values)

    def _line(self, values: dict[str, Any]) -> str:
        left = (self.total_steps - values["step"]) * values["time/step_s"]
        align = "   -  " if values["loss/align"] is None else f"{values['loss/align']:.4f}"
        memory = f"  {values['memory/peak_gib']:.1f} GiB" if values["memory/peak_gib"] else ""
        return (
            f"step {values['step']:>6}/{self.total_steps}  text {values['loss/text']:.4f}  align {align}"
            f"  lr {values['optim/lr']:.2e}  |g| {values['optim/grad_norm']:.3f}"
            f"  {values['speed/samples_per_s']:.1f} samples/s  {values['speed/tokens_per_s']:.0f} tok/s"
            f"  pad {values['data/padding_ratio']:.1%}  wait {values['time/data_wait_s']:.3f}s{memory}"
            f"  left {time.strftime('%H:%M:%S', time.gmtime(left))}"
        )

    def _write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")

    def _to_wandb(self, values: dict[str, Any]) -> None:
        if self.wandb is not None:
            known = {key: value for key, value in values.items() if value is not None}
            self._ask_wandb(lambda: self.wandb.log(known, step=values["step"]))

    def _ask_wandb(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except Exception as error:  # whatever ails wandb, the training does not depend on it
            print(f"wandb: {error}; going on without it", flush=True)
            self.wandb = None


def _finite(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Window:
    """Rates between two log lines."""

    def __init__(self) -> None:
        self.started, self.batches = time.monotonic(), list[GlobalBatch]()

    def add(self, batch: GlobalBatch) -> None:
        self.batches.append(batch)

    def close(self) -> dict[str, float]:
        seconds, count = time.monotonic() - self.started, len(self.batches)
        rates = {
            "speed/samples_per_s": sum(batch.samples for batch in self.batches) / seconds,
            "speed/tokens_per_s": sum(batch.tokens for batch in self.batches) / seconds,
            "time/step_s": seconds / count,
            "time/data_wait_s": sum(batch.wait_s for batch in self.batches) / count,
            "data/padding_ratio": sum(batch.padding_ratio for batch in self.batches) / count,
        }
        self.__init__()  # type: ignore[misc]
        return rates


def _open_for_lines(path: Path) -> TextIO:
    """To append lines, after one that a kill may have cut off."""
    cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)
    if cut_off:
        file.write("\n")
    return file


def _open_wandb(recipe: Recipe, folder: Path) -> Any:
    """One wandb run per run folder, however often it is resumed; None if it cannot be had."""
    try:
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=recipe.log.project,
            name=folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode="offline" if recipe.log.wandb == "offline" else "online",
            dir=str(folder),
            config=asdict(recipe),
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:
        print(f"wandb: {error}; going on without it", flush=True)
        return None
