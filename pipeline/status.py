"""What a run is doing, or did, and where its wall time went; for a live run or a dead one.

python -m pipeline.status runs/v2
python -m pipeline.status runs/v2 --json
python -m pipeline.status runs/v2 --png loss.png        # the loss across restarts (needs matplotlib)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError

QUIET_S = 120.0  # a run that says nothing for this long, or for ten of its lines, is taken for dead
ENDS = ("done", "stopped")


@dataclass
class Ledger:
    """Seconds of wall time by what they went into, from the first start to the last sign of life.

    `down` is the time between a start's end, or last sign of life, and the next start: queued, or dead and unnoticed.
    """

    training: float = 0.0
    waiting_for_data: float = 0.0
    redone_steps: float = 0.0
    saving: float = 0.0
    starting: float = 0.0
    down: float = 0.0
    total: float = 0.0

    @property
    def other(self) -> float:
        return max(0.0, self.total - sum(v for k, v in asdict(self).items() if k != "total"))

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were done that had not been done before."""
        return self.training / self.total if self.total else 0.0


@dataclass
class Start:
    """One start of the command: from which step, when, and how the one before had ended."""

    step: int
    time: float
    before: str


@dataclass
class History:
    """What the lines of metrics.jsonl tell together."""

    ledger: Ledger = field(default_factory=Ledger)
    starts: list[Start] = field(default_factory=list)
    losses: dict[int, tuple[float, float | None]] = field(default_factory=dict)  # step -> text, align
    step: int = 0
    total_steps: int = 0
    step_s: float = 0.0
    line_s: float = 0.0  # between the last two lines of steps
    last_time: float = 0.0
    last_event: str = ""


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
        if line.get("event") in ("start", "resume"):
            _begin(history, line)
            here = line["step"]
        elif "event" not in line:
            _advance(history, line, here)
            here = line["step"]
        elif line["event"] == "save":
            history.ledger.saving += line["seconds"]
        history.last_event = line.get("event", "")
        history.last_time = line["time"]
    history.ledger.total = history.last_time - (lines[0].get("began") or lines[0]["time"])
    return history


def _begin(history: History, line: dict[str, Any]) -> None:
    began = line["began"]
    if history.starts:
        history.ledger.down += max(0.0, began - history.last_time)
    before = history.last_event if history.last_event in ENDS else "killed or crashed"
    history.starts.append(Start(line["step"], began, before if history.starts else ""))
    history.ledger.starting += line["time"] - began
    history.total_steps, history.step = line["total_steps"], line["step"]


def _advance(history: History, line: dict[str, Any], here: int) -> None:
    """Steps `here + 1` to `line["step"]` were done; those that an earlier start had done already count as redone."""
    count = line["step"] - here
    known = max(history.losses, default=0)
    redone = max(0, min(line["step"], known) - here)
    waited = line["time/data_wait_s"] * count
    history.ledger.waiting_for_data += waited
    history.ledger.redone_steps += (line["time/step_s"] * count - waited) * redone / count
    history.ledger.training += (line["time/step_s"] * count - waited) * (count - redone) / count
    text = float("nan") if line["loss/text"] is None else line["loss/text"]
    history.losses[line["step"]] = (text, line["loss/align"])
    history.step, history.step_s, history.line_s = line["step"], line["time/step_s"], line["time/step_s"] * count


def state_of(run: Path, history: History, now: float) -> str:
    """ "done", "stopped", "failed: …", "running", or "dead" if it ended without a word."""
    outcome = run / "outcome.json"
    if outcome.exists():
        told = json.loads(outcome.read_text(encoding="utf-8"))
        return told["outcome"] if told["outcome"] in ENDS else f"failed: {told['reason']}"
    silent_s = now - history.last_time
    return "running" if silent_s < max(QUIET_S, 10 * history.line_s) else f"dead: silent for {_clock(silent_s)}"


def table(run: Path, history: History, now: float) -> str:
    ledger = history.ledger
    left = (history.total_steps - history.step) * history.step_s
    lines = [
        f"{run}: {state_of(run, history, now)}, step {history.step} of {history.total_steps}, {_clock(left)} left",
        f"{'wall time':<18} {_clock(ledger.total):>10}",
    ]
    parts = {**asdict(ledger), "other": ledger.other}
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        if name != "total" and seconds >= 0.5:
            lines.append(f"  {name.replace('_', ' '):<16} {_clock(seconds):>10}  {seconds / ledger.total:6.1%}")
    lines.append(f"goodput {ledger.goodput:.1%}; {len(history.starts)} start(s)")
    for start in history.starts[1:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time))
        lines.append(f"  {when}  resumed at step {start.step} after it was {start.before}")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def draw(history: History, path: Path) -> None:
    """Both losses over the steps, with every restart marked. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = sorted(history.losses)
    for place, name in enumerate(("text", "align")):
        values = [float("nan") if (loss := history.losses[step][place]) is None else loss for step in steps]
        axes.plot(steps, values, ".-", ms=2, lw=0.9, label=name)
    for start in history.starts[1:]:
        axes.axvline(start.step, color="grey", ls="--", lw=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the losses there")
    args = parser.parse_args()
    history, now = read_history(args.run), time.time()
    if args.json:
        facts = {**asdict(history), "state": state_of(args.run, history, now), "goodput": history.ledger.goodput}
        print(json.dumps(facts, indent=2))
    else:
        print(table(args.run, history, now))
    if args.png:
        draw(history, args.png)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
