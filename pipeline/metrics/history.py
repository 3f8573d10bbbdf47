"""What a run folder tells of a run: the lines of metrics.jsonl over all its starts, put together."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError

ENDS = ("done", "stopped")
SLOW_RANK = 1.25  # times the median rank's time: worth telling
TEXT_OF_SOURCE, SAMPLES_OF_SOURCE = "loss/text/", "data/samples/"


@dataclass
class Ledger:
    """Seconds of wall time by what they went into, from the first start to the last sign of life.

    `queued` is between an orderly end and the next start, `down` the same after a death, that nobody saw perhaps.
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
        """All of the total."""
        named = {name: seconds for name, seconds in asdict(self).items() if name != "total"}
        return {**named, "other": max(0.0, self.total - sum(named.values()))}

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were done that had not been done before."""
        return self.training / self.total if self.total else 0.0


@dataclass
class Start:
    """One start of the command: from which step, when, how the one before had ended, seconds by phase to the loop."""

    step: int
    time: float
    before: str
    phases: dict[str, float] = field(default_factory=dict)


@dataclass
class SpikeSeen:
    step: int
    key: str
    value: float
    z: float


@dataclass
class History:
    """By step, later lines winning over those of steps that were redone."""

    ledger: Ledger = field(default_factory=Ledger)
    starts: list[Start] = field(default_factory=list)
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)  # text, align
    heldout: dict[int, tuple[float, float | None]] = field(default_factory=dict)  # the same of held-out samples
    sources: dict[str, dict[int, tuple[float | None, int]]] = field(default_factory=dict)  # name: step: text, samples
    heldout_sources: dict[str, float | None] = field(default_factory=dict)  # text, at the last evaluation
    spikes: dict[str, SpikeSeen] = field(default_factory=dict)  # by step and key
    nonfinite: list[int] = field(default_factory=list)
    step: int = 0
    total_steps: int = 0
    step_s: float = 0.0
    paused_s: float = 0.0  # saving and evaluating, since the last start
    last_line: dict[str, Any] = field(default_factory=dict)
    last_time: float = 0.0
    last_event: str = ""

    @property
    def left_s(self) -> float:
        done = self.step - (self.starts[-1].step if self.starts else 0)
        return seconds_left(self.total_steps - self.step, self.step_s, self.paused_s, done)


def read_history(run: Path) -> History:
    """Raises: UserError if the folder holds no run."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run}: no run to tell of: {error}") from None
    lines = [line for line in map(_parse, text.splitlines()) if line is not None]
    if not lines:
        raise UserError(f"{run}: its metrics.jsonl holds nothing yet")
    try:
        return tell(lines)
    except KeyError as error:
        raise UserError(f"{run}: metrics.jsonl is of another version: no key {error}") from None


def has_event(run: Path, name: str, step: int) -> bool:
    """Whether some start of a run told of it."""
    return any(line.get("event") == name and line["step"] == step for line in _lines(run))


def has_stepped_with(run: Path, world_size: int, settings: dict[str, Any]) -> bool:
    """Whether some start on so many ranks, with these settings for memory, has told of a step. Raises: OSError.

    One of an earlier version, which did not write them down, is taken to have had them.
    """
    alike = False
    for line in _lines(run):
        if line.get("event") in ("start", "resume"):
            alike = line.get("world_size") == world_size and line.get("settings", settings) == settings
        elif alike and ("event" not in line or line["event"] == "save"):
            return True
    return False


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    """No lines before the first start."""
    with contextlib.suppress(FileNotFoundError):
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        yield from (line for line in map(_parse, text.splitlines()) if line is not None)


def _parse(line: str) -> dict[str, Any] | None:
    """None for a line that a kill has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def tell(lines: list[dict[str, Any]]) -> History:
    """The history behind the lines, in the order in which they were written."""
    history, here = History(), 0  # `here`: the step that this start has reached
    for line in lines:
        match line.get("event"):
            case "start" | "resume":
                _begin(history, line)
                here = line["step"]
            case None:
                _advance(history, line, here)
                here = line["step"]
            case event:
                _note(history, event, line)
        # What a start says after it failed or lost a rank comes of that.
        if line.get("event") in ("start", "resume") or not history.last_event:
            history.last_event = _ending(line)
        history.last_time = line["time"]
    history.ledger.total = history.last_time - (lines[0].get("began") or lines[0]["time"])
    return history


def _ending(line: dict[str, Any]) -> str:
    """What a start that says nothing after this line has ended by; nothing for no ending."""
    event = line.get("event")
    if event in ENDS:
        return str(event)
    return f"{event}: {line['reason']}" if event in ("lost", "failed") else ""


def _begin(history: History, line: dict[str, Any]) -> None:
    began, phases = line["began"], line.get("start_s", {})
    resuming = phases.get("checkpoint", 0.0)
    if history.starts:
        gap = max(0.0, began - history.last_time)
        if history.last_event:
            history.ledger.queued += gap
        else:
            history.ledger.down += gap
    before = history.last_event or "killed or crashed"
    history.starts.append(Start(line["step"], began, before if history.starts else "", phases))
    history.ledger.resuming += resuming
    history.ledger.starting += line["time"] - began - resuming
    history.total_steps, history.step = line["total_steps"], line["step"]
    history.paused_s = 0.0


def _note(history: History, event: str, line: dict[str, Any]) -> None:
    step = line["step"]
    if event in ("save", *ENDS):
        history.step = max(history.step, step)
    if event == "save":
        history.ledger.saving += line["seconds"]
        history.paused_s += line["seconds"]
    elif event == "heldout":
        history.ledger.evaluating += line["seconds"]
        history.paused_s += line["seconds"]
        history.heldout[step] = _number(line["heldout/loss/text"]), line["heldout/loss/align"]
        prefix = f"heldout/{TEXT_OF_SOURCE}"
        history.heldout_sources = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
    elif event == "spike":
        history.spikes[f"{step} {line['key']}"] = SpikeSeen(step, line["key"], line["value"], line["z"])
    elif event == "nonfinite" and step not in history.nonfinite:
        history.nonfinite.append(step)


def _advance(history: History, line: dict[str, Any], here: int) -> None:
    """Steps `here + 1` to `line["step"]` were done; those that an earlier start had done already count as redone."""
    step, count = line["step"], line["step"] - here
    redone = max(0, min(step, max(history.losses, default=0)) - here)
    waited = line["time/data_wait_s"] * count
    history.ledger.waiting_for_data += waited
    history.ledger.redone_steps += (line["time/step_s"] * count - waited) * redone / count
    history.ledger.training += (line["time/step_s"] * count - waited) * (count - redone) / count
    history.losses[step] = _number(line["loss/text"]), line["loss/align"]
    for key in line:
        if key.startswith(TEXT_OF_SOURCE):
            name = key.removeprefix(TEXT_OF_SOURCE)
            history.sources.setdefault(name, {})[step] = line[key], line[f"{SAMPLES_OF_SOURCE}{name}"]
    history.step, history.step_s = step, line["time/step_s"]
    history.last_line = line


def seconds_left(steps: int, step_s: float, paused_s: float, done: int) -> float:
    """Of `steps` at the present rate, with as much saving and evaluating as in the `done` ones of this start."""
    return steps * (step_s + paused_s / max(1, done))


def hours(seconds: float) -> str:
    whole, rest = divmod(round(seconds), 3600)
    return f"{whole}:{rest // 60:02}:{rest % 60:02}"


def finite(facts: Any) -> Any:
    """With None for each number that JSON has no word for, at any depth."""
    if isinstance(facts, dict):
        return {key: finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def _number(value: float | None) -> float:
    """The way back."""
    return float("nan") if value is None else value
