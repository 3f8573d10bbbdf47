"""Status of a running or ended run: its state, its progress, and what its wall time was spent on.

python -m pipeline.status runs/v2
python -m pipeline.status runs/v2 --json
python -m pipeline.status runs/v2 --png loss.png        # the losses across restarts
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from model.errors import run_cli
from pipeline.metrics.history import ENDS, SLOW_RANK_RATIO, History, finite, read_history
from preprocess.progress import format_duration

MAX_SILENCE_S = 120.0  # a run whose watchdog gives no heartbeat for this long is reported as dead
MAX_START_S = 1800.0  # the same limit during start-up, and for runs of older versions, which have no heartbeat
AVERAGED_LINES = 10  # number of last log lines over which a source's loss is averaged
SHOWN_SPIKES = 5


def state_of(run: Path, history: History, now: float) -> str:
    """Return the state of a run.

    It is "starting", "running", "done", "stopped by …", "failed: …", "lost: …", or "dead: …" for a run that ended
    without recording why.
    """
    if start := state_of_start(run, now):
        return start
    if outcome := _outcome(run / "outcome.json"):
        if outcome["outcome"] in ENDS:
            return f"{outcome['outcome']} {outcome['reason']}".strip()
        return history.last_event or f"{outcome['outcome']}: {outcome['reason']}"
    if history.last_event:  # a crash writes no outcome.json, because the batch script retries it
        return history.last_event
    return _running_or_dead(run / "control/alive", history, now)


def _outcome(file: Path) -> dict[str, str]:
    """Read the outcome and its reason. Return an empty dict if there is no outcome, or if its file is damaged."""
    try:
        outcome = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        return {name: str(outcome[name]) for name in ("outcome", "reason")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def state_of_start(run: Path, now: float) -> str | None:
    """Return the state of a launch that has not reached the training loop, or None if there is no such launch."""
    mark = run / "control/starting"
    try:
        failure, seconds = mark.read_text(encoding="utf-8", errors="replace").strip(), now - mark.stat().st_mtime
    except FileNotFoundError:
        return None
    if failure:
        return failure
    return "starting" if seconds < MAX_START_S else f"dead: still starting after {format_duration(seconds)}"


def _running_or_dead(heartbeat: Path, history: History, now: float) -> str:
    """Judge a run that recorded no end by its heartbeat, which continues during a long step, save or validation."""
    try:
        last, limit_s = max(history.last_time, heartbeat.stat().st_mtime), MAX_SILENCE_S
    except FileNotFoundError:  # a run of an older version
        last, limit_s = history.last_time, MAX_START_S
    return "running" if now - last < limit_s else f"dead: silent for {format_duration(now - last)}"


def table(run: Path, history: History, now: float) -> str:
    """Format the status of a run for the console."""
    left = f", {format_duration(history.left_s)} left" if history.step_s else ""
    lines = [f"{run}: {state_of(run, history, now)}, step {history.step} of {history.total_steps}{left}"]
    for section in (_speed, _wall_time, _starts, _sources, _warnings):
        lines += section(history)
    return "\n".join(lines)


def _speed(history: History) -> list[str]:
    last = history.last_line
    if not last:
        return []
    facts = [f"{last['speed/samples_per_s']:.1f} samples/s", f"{last['speed/tokens_per_s']:.0f} tok/s"]
    if last.get("speed/mfu") is not None:  # None on the CPU, absent in runs of older versions
        facts.append(f"MFU {last['speed/mfu']:.1%}")
    facts += [f"padding {last['data/padding_ratio']:.1%}", f"step {last['time/step_s']:.2f} s"]
    facts.append(f"{last['time/data_wait_s']:.3f} s of it waiting for data")
    if (last.get("ranks/slowest_ratio") or 1.0) >= SLOW_RANK_RATIO:
        facts.append(f"rank {last['ranks/slowest']} takes {last['ranks/slowest_ratio']:.2f} times as long as others")
    return ["recent speed: " + ", ".join(facts)]


def _wall_time(history: History) -> list[str]:
    ledger = history.ledger
    lines = [f"{'wall time':<18} {format_duration(ledger.total):>10}"]
    for name, seconds in sorted(ledger.parts.items(), key=lambda part: -part[1]):
        if seconds >= 0.5:
            lines.append(
                f"  {name.replace('_', ' '):<16} {format_duration(seconds):>10}  {seconds / ledger.total:6.1%}"
            )
    return lines


def _starts(history: History) -> list[str]:
    restarts = (
        f"  {_local_time(start.time)}  resumed at step {start.step} after it was {start.before}"
        for start in history.starts[1:]
    )
    count = len(history.starts)
    launches = f"{count} launch{'es' if count != 1 else ''}"
    return [f"goodput {history.ledger.goodput:.1%}; {launches}", *restarts, *_last_start(history)]


def _last_start(history: History) -> list[str]:
    """Return a line with the seconds of each start-up phase of the last launch. Older versions did not log them."""
    phases = history.starts[-1].phases if history.starts else {}
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    return [f"start-up of the last launch: {sum(phases.values()):.1f} s ({parts})"] if phases else []


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _sources(history: History) -> list[str]:
    """Return a table of the sources: samples seen, recent text loss, and text loss of the last validation."""
    if not history.sources:
        return []
    width = max(map(len, history.sources))
    lines = [f"{'source':<{width}} {'samples':>12} {'text loss':>10} {'held out':>10}"]
    for name, by_step in history.sources.items():
        recent = [by_step[step] for step in sorted(by_step) if by_step[step][0] is not None][-AVERAGED_LINES:]
        weight = sum(samples for _, samples in recent)
        loss = sum((text or 0.0) * samples for text, samples in recent) / weight if weight else None
        seen = sum(samples for _, samples in by_step.values())
        lines.append(f"{name:<{width}} {seen:>12,} {_loss(loss)} {_loss(history.heldout_sources.get(name))}")
    return lines


def _loss(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>10}"


def _warnings(history: History) -> list[str]:
    lines = []
    if history.nonfinite:
        lines.append(f"steps without a finite loss or gradient: {', '.join(map(str, history.nonfinite))}")
    if history.spikes:
        shown = [f"{s.step} ({s.key.rpartition('/')[2]} {s.value:.3g}, z {s.z:.0f})" for s in history.spikes.values()]
        more = f" and {len(shown) - SHOWN_SPIKES} before" if len(shown) > SHOWN_SPIKES else ""
        lines.append(f"spikes at steps {', '.join(shown[-SHOWN_SPIKES:])}{more}; metrics.jsonl has their samples")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder, run.dir of the recipe")
    parser.add_argument("--json", action="store_true", help="print the whole history as JSON instead of a table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the losses and the wall time into FILE")
    args = parser.parse_args()
    now = time.time()
    state = state_of_start(args.run, now)
    if state and not (args.run / "metrics.jsonl").exists():
        print(json.dumps({"state": state}) if args.json else f"{args.run}: {state}; no step has been done yet")
        return
    history = read_history(args.run)
    if args.png:
        from pipeline.figures.curves import draw_run  # imports matplotlib, which takes a second

        draw_run(history, args.png)
    if args.json:
        facts = {**asdict(history), "state": state_of(args.run, history, now), "goodput": history.ledger.goodput}
        print(json.dumps(finite(facts), indent=2))
    else:
        print(table(args.run, history, now))


if __name__ == "__main__":
    run_cli(main)
