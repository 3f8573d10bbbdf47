"""What a run is doing, or did, and where its wall time went; for a live run or a dead one.

python -m pipeline.status runs/v2
python -m pipeline.status runs/v2 --json
python -m pipeline.status runs/v2 --png loss.png        # the loss across restarts (needs matplotlib)
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path

from model.errors import run_cli
from pipeline.metrics.history import ENDS, SLOW_RANK_RATIO, History, finite, format_duration, read_history

QUIET_S = 120.0  # a run whose watchdog gives no sign of life for this long is taken for dead
START_S = 1800.0  # the same for a start that loads, or a run of a version without such signs: a watchdog's default
LATE_LINES = 10  # of the log that a source's loss is averaged over
SHOWN_SPIKES = 5


def state_of(run: Path, history: History, now: float) -> str:
    """ "done", "stopped by …", "failed: …", "lost: …", "starting", "running", or "dead" if it ended without a word."""
    if start := state_of_start(run, now):
        return start
    outcome = run / "outcome.json"
    if outcome.exists():
        told = json.loads(outcome.read_text(encoding="utf-8"))
        if told["outcome"] in ENDS:
            return f"{told['outcome']} {told['reason']}".strip()
        return history.last_event or f"{told['outcome']}: {told['reason']}"
    if history.last_event:  # a crash tells no outcome, because it is tried again
        return history.last_event
    return state_of_silence(run / "control/alive", history, now)


def state_of_silence(alive: Path, history: History, now: float) -> str:
    """Of a run that has not told of its end. How long a step, a save or an evaluation may take, its watchdog knows."""
    try:
        last, limit_s = max(history.last_time, alive.stat().st_mtime), QUIET_S
    except FileNotFoundError:  # an earlier version's
        last, limit_s = history.last_time, START_S
    return "running" if now - last < limit_s else f"dead: silent for {format_duration(now - last)}"


def state_of_start(run: Path, now: float) -> str | None:
    """Of a start that has claimed the folder and not come to its steps; None if there is none."""
    mark = run / "control/starting"
    try:
        word, since_s = mark.read_text(encoding="utf-8").strip(), now - mark.stat().st_mtime
    except FileNotFoundError:
        return None
    return word or ("starting" if since_s < START_S else f"dead: it began to start {format_duration(since_s)} ago")


def table(run: Path, history: History, now: float) -> str:
    left = f", {format_duration(history.left_s)} left" if history.step_s else ""
    lines = [f"{run}: {state_of(run, history, now)}, step {history.step} of {history.total_steps}{left}"]
    for part in (_lately, _wall_time, _starts, _sources, _warnings):
        lines += part(history)
    return "\n".join(lines)


def _lately(history: History) -> list[str]:
    """What the last line says of speed."""
    last = history.last_line
    if not last:
        return []
    facts = [f"{last['speed/samples_per_s']:.1f} samples/s", f"{last['speed/tokens_per_s']:.0f} tok/s"]
    if last.get("speed/mfu") is not None:  # a run of an earlier version has less to tell
        facts.append(f"MFU {last['speed/mfu']:.1%}")
    facts += [f"padding {last['data/padding_ratio']:.1%}", f"step {last['time/step_s']:.2f} s"]
    facts.append(f"{last['time/data_wait_s']:.3f} s of it waiting for data")
    if (last.get("ranks/slowest_ratio") or 1.0) >= SLOW_RANK_RATIO:
        facts.append(f"rank {last['ranks/slowest']} takes {last['ranks/slowest_ratio']:.2f} times as long as others")
    return ["lately " + ", ".join(facts)]


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
        f"  {_when(start.time)}  resumed at step {start.step} after it was {start.before}"
        for start in history.starts[1:]
    )
    return [f"goodput {history.ledger.goodput:.1%}; {len(history.starts)} start(s)", *restarts, *_phases(history)]


def _phases(history: History) -> list[str]:
    """Where the last start's time went."""
    phases = history.starts[-1].phases if history.starts else {}
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    return [f"last start {sum(phases.values()):.1f} s: {told}"] if phases else []


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _sources(history: History) -> list[str]:
    """Samples seen, the text loss lately, and the held-out one."""
    if not history.sources:
        return []
    width = max(map(len, history.sources))
    lines = [f"{'source':<{width}} {'samples':>12} {'text loss':>10} {'held out':>10}"]
    for name, by_step in history.sources.items():
        late = [by_step[step] for step in sorted(by_step) if by_step[step][0] is not None][-LATE_LINES:]
        weight = sum(samples for _, samples in late)
        loss = sum((text or 0.0) * samples for text, samples in late) / weight if weight else None
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
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the losses there")
    args = parser.parse_args()
    now = time.time()
    state = state_of_start(args.run, now)
    if state and not (args.run / "metrics.jsonl").exists():
        print(json.dumps({"state": state}) if args.json else f"{args.run}: {state}; it has not done a step yet")
        return
    history = read_history(args.run)
    if args.png:
        from pipeline.metrics.figures import draw_run  # imports matplotlib, which takes a second

        draw_run(history, args.png)
    if args.json:
        facts = {**asdict(history), "state": state_of(args.run, history, now), "goodput": history.ledger.goodput}
        print(json.dumps(finite(facts), indent=2))
    else:
        print(table(args.run, history, now))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` has read enough
    run_cli(main)
