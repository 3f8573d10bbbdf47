"""Run history: losses, restarts and wall time of a run, computed from its `metrics.jsonl`.

A launch is one start of the training command. A run that was interrupted has several launches, which all append to the
same `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError, read_error

STARTS = ("start", "resume")  # events that a launch logs when its training loop begins
ENDS = ("done", "stopped")  # events that a launch logs when it ends without an error
SLOW_RANK_RATIO = 1.25  # a rank that takes this many times as long as the median rank is reported as slow
TEXT_LOSS, SAMPLES = "loss/text/", "data/samples/"  # prefixes of keys that end with a source's name


@dataclass(kw_only=True)
class Ledger:
    """Wall time in seconds, by activity, from the first launch to the last line of `metrics.jsonl`.

    Attributes:
        training: steps done for the first time, without the time that they waited for data.
        redone_steps: steps that were done again after a crash.
        starting: from the start of the process to the training loop, without loading the checkpoint.
        resuming: loading the checkpoint.
        queued: from a recorded end (stopped, lost or failed) to the next launch.
        down: from an unrecorded crash to the next launch.
    """

    training: float = 0.0
    waiting_for_data: float = 0.0
    redone_steps: float = 0.0
    saving: float = 0.0
    evaluating: float = 0.0
    starting: float = 0.0
    resuming: float = 0.0
    queued: float = 0.0
    down: float = 0.0
    total: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Return the seconds of each part, with `other` for the rest of the total."""
        parts = {name: seconds for name, seconds in asdict(self).items() if name != "total"}
        return {**parts, "other": max(0.0, self.total - sum(parts.values()))}

    @property
    def goodput(self) -> float:
        """Return the share of the wall time that was spent on steps done for the first time."""
        return self.training / self.total if self.total else 0.0


@dataclass(kw_only=True)
class Start:
    """One launch of the training command.

    Attributes:
        step: number of steps done before this launch.
        time: when the process started, in seconds since 1970.
        before: how the previous launch ended; empty for the first launch.
        phases: seconds of each phase before the training loop.
    """

    step: int
    time: float
    before: str
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class LoggedSpike:
    """A `spike` event of `metrics.jsonl`."""

    step: int
    key: str
    value: float
    z: float


@dataclass(kw_only=True)
class History:
    """History of a run over all its launches. If a step was done twice, the later line counts.

    Attributes:
        losses: (text, align) by step; align is None for a text-only step.
        heldout: (text, align) of each validation, by step.
        sources: (text loss, number of samples) by source and step.
        heldout_sources: text loss of the last validation, by source.
        spikes: spike events by "<step> <key>".
        nonfinite: steps without a finite loss or gradient.
        step_s: seconds per step, from the last line that reports a step.
        paused_s: seconds of saving and validation since the last launch.
        last_line: the last line that reports a step.
        last_event: how the last launch ended; empty if it recorded no end.
    """

    ledger: Ledger = field(default_factory=Ledger)
    starts: list[Start] = field(default_factory=list)
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    heldout: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    sources: dict[str, dict[int, tuple[float | None, int]]] = field(default_factory=dict)
    heldout_sources: dict[str, float | None] = field(default_factory=dict)
    spikes: dict[str, LoggedSpike] = field(default_factory=dict)
    nonfinite: list[int] = field(default_factory=list)
    step: int = 0
    total_steps: int = 0
    step_s: float = 0.0
    paused_s: float = 0.0
    last_line: dict[str, Any] = field(default_factory=dict)
    last_time: float = 0.0
    last_event: str = ""

    @property
    def left_s(self) -> float:
        """Return the estimated seconds to the end of the run."""
        done = self.step - (self.starts[-1].step if self.starts else 0)
        return seconds_left(
            steps=self.total_steps - self.step, step_s=self.step_s, paused_s=self.paused_s, steps_done=done
        )


def read_history(run: Path) -> History:
    """Read the history of a run folder. Raises: UserError if the folder holds no run."""
    try:
        lines = list(_read_lines(run))
    except PermissionError as error:
        raise read_error(error, run / "metrics.jsonl") from None
    except OSError as error:
        raise UserError(f"{run}: no run found in this folder: {error}") from None
    if not lines:
        raise UserError(f"{run}: metrics.jsonl has no complete line yet")
    try:
        return replay(lines)
    except KeyError as error:
        raise UserError(f"{run}: metrics.jsonl was written by another version: it has no key {error}") from None


def has_event(run: Path, name: str, step: int) -> bool:
    """Return whether any launch of a run logged this event at this step."""
    with contextlib.suppress(FileNotFoundError):  # before the first launch
        return any(line.get("event") == name and line.get("step") == step for line in _read_lines(run))
    return False


def has_stepped_with(run: Path, *, world_size: int, settings: dict[str, Any]) -> bool:
    """Return whether a launch with this world size and these memory settings logged a step. Raises: OSError.

    Only the settings that the launch logged are compared, because older versions logged fewer settings.
    """
    matches = False
    with contextlib.suppress(FileNotFoundError):  # before the first launch
        for line in _read_lines(run):
            if line.get("event") in STARTS:
                logged = line.get("settings", {})
                same = {key: settings.get(key) for key in logged} == logged
                matches = same and line.get("world_size") == world_size
            elif matches and ("event" not in line or line["event"] == "save"):
                return True
    return False


def _read_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl`.

    Skip a line that is incomplete, which a killed process can leave, or that a failing disk has damaged.
    """
    with (run / "metrics.jsonl").open(encoding="utf-8", errors="replace", newline="\n") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and not any("\ufffd" in key for key in line):
                    yield line


def replay(lines: list[dict[str, Any]]) -> History:
    """Build the history from the lines of `metrics.jsonl`, in the order in which they were written."""
    history, reached = History(), 0  # `reached`: the last step that the current launch logged
    for line in lines:
        match line.get("event"):
            case "start" | "resume":
                _replay_start(history, line)
                reached = line["step"]
            case None:
                reached = min(reached, line["step"] - 1)  # it is larger if the line of the launch is damaged
                _replay_step(history, line, reached)
                reached = line["step"]
            case event:
                _replay_event(history, event, line)
        # Keep the first recorded end of a launch, because it is the cause. Errors logged after it are consequences.
        if line.get("event") in STARTS or not history.last_event:
            history.last_event = _end_of_start(line)
        history.last_time = line["time"]
    history.ledger.total = history.last_time - (lines[0].get("began") or lines[0]["time"])
    return history


def _end_of_start(line: dict[str, Any]) -> str:
    """Return how a launch ended if this line records its end, otherwise an empty string."""
    event = line.get("event")
    if event in ENDS:
        return str(event)
    return f"{event}: {line['reason']}" if event in ("lost", "failed") else ""


def _replay_start(history: History, line: dict[str, Any]) -> None:
    began, phases = line["began"], line.get("start_s", {})
    before = ""
    if history.starts:
        before = history.last_event or "killed or crashed"
        gap = max(0.0, began - history.last_time)
        if history.last_event:
            history.ledger.queued += gap
        else:
            history.ledger.down += gap
    history.starts.append(Start(step=line["step"], time=began, before=before, phases=phases))
    resuming = phases.get("checkpoint", 0.0)
    history.ledger.resuming += resuming
    history.ledger.starting += line["time"] - began - resuming
    history.total_steps, history.step = line["total_steps"], line["step"]
    history.paused_s = 0.0


def _replay_step(history: History, line: dict[str, Any], reached: int) -> None:
    """Add the steps `reached + 1` to `line["step"]`. Steps that an earlier launch has done count as redone."""
    step, count = line["step"], line["step"] - reached
    redone = max(0, min(step, max(history.losses, default=0)) - reached)
    waited = line["time/data_wait_s"] * count
    busy = line["time/step_s"] * count - waited
    history.ledger.waiting_for_data += waited
    history.ledger.redone_steps += busy * redone / count
    history.ledger.training += busy * (count - redone) / count
    history.losses[step] = _nan_if_null(line["loss/text"]), line["loss/align"]
    for key in line:
        if key.startswith(TEXT_LOSS):
            name = key.removeprefix(TEXT_LOSS)
            history.sources.setdefault(name, {})[step] = line[key], line[f"{SAMPLES}{name}"]
    history.step, history.step_s = step, line["time/step_s"]
    history.last_line = line


def _replay_event(history: History, event: str, line: dict[str, Any]) -> None:
    step = line["step"]
    if event in ("save", *ENDS):
        history.step = max(history.step, step)
    if event == "save":
        history.ledger.saving += line["seconds"]
        history.paused_s += line["seconds"]
    elif event in ("heldout", "images"):
        history.ledger.evaluating += line["seconds"]
        history.paused_s += line["seconds"]
    if event == "heldout":
        history.heldout[step] = _nan_if_null(line["heldout/loss/text"]), line["heldout/loss/align"]
        prefix = f"heldout/{TEXT_LOSS}"
        history.heldout_sources = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
    elif event == "spike":
        spike = LoggedSpike(step=step, key=line["key"], value=line["value"], z=line["z"])
        history.spikes[f"{step} {line['key']}"] = spike
    elif event == "nonfinite" and step not in history.nonfinite:
        history.nonfinite.append(step)


def seconds_left(*, steps: int, step_s: float, paused_s: float, steps_done: int) -> float:
    """Estimate the seconds for the remaining steps of a run.

    Args:
        steps: number of remaining steps.
        step_s: seconds per step.
        paused_s: seconds that saving and validation took during the last `steps_done` steps.
    """
    return steps * (step_s + paused_s / max(1, steps_done))


def finite(values: Any) -> Any:
    """Replace nan and infinity by None, at any depth, because JSON cannot represent them."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _nan_if_null(value: float | None) -> float:
    """Inverse of `finite`: None becomes nan."""
    return float("nan") if value is None else value
