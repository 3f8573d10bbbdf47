"""Markdown tables of `benchmarks.multi_gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.metrics.throughput import PEAK_FLOPS, peak_flops

PAPER_STEPS = 19_232
SPEED_HEAD = [
    *("model", "engine", "ranks", "micro-batch", "limit GiB", "ms/step", "samples/s", "MFU", "communication"),
    *("data wait", "padding", "peak GiB", "predicted GiB"),
]
STARTS = {
    "start": "first launch",
    "resume": "resume on all ranks",
    "resume_on_half": "resume on half the ranks",
    "resume_after_lost_rank": "resume after a lost rank",
}

Row = dict[str, Any]


def table(stages: Mapping[str, Row | None]) -> str:
    """Return the tables of all stages that have results, by name of the stage."""
    found = {name: stage for name, stage in stages.items() if stage}
    rows = [row for name in ("speed_v2", "speed_v1", "zero2", "scaling") for row in _results(found, name)]
    parts = [", ".join(sorted({f"{stage['ranks']} × {stage['gpu']}" for stage in found.values()}))]
    if rows:
        parts.append(_markdown(SPEED_HEAD, [_speed_cells(row) for row in rows]))
    parts += [f"not measured: {_name(row)}: {row['failed']}" for row in rows if "failed" in row]
    parts += [_hours(row, found[name]["gpu"]) for name in ("speed_v2", "speed_v1") for row in _results(found, name)]
    if scaling := [row for row in _results(found, "scaling") if "failed" not in row]:
        parts.append(_scaling(scaling))
    if resume := found.get("resume"):
        parts.append(_resumes(resume["results"]))
    if tests := found.get("tests"):
        result = tests["results"]
        parts.append(f"tests: {' '.join(result['summary'])} (exit code {result['exit_code']})")
    return "\n\n".join(part for part in parts if part)


def _results(found: Mapping[str, Row], name: str) -> list[Row]:
    return found[name]["results"] if name in found else []


def _name(row: Row) -> str:
    return f"{row['model']}, {row['engine']}, {row['ranks']} ranks, micro-batch {row['micro_batch']}"


def _speed_cells(row: Row) -> list[str]:
    head = [row["model"], row["engine"], row["ranks"], row["micro_batch"], row["memory_gib"] or "none"]
    if "failed" in row:
        return [*map(str, head), "failed", *[""] * (len(SPEED_HEAD) - len(head) - 1)]
    predicted = row["predicted"] or {"step_s": None, "peak_gib": None}
    cells = [f"{1000 * row['step_s']:.0f}", f"{row['samples_per_s']:.1f}", _percent(row["mfu"])]
    cells += [
        _percent(communication(row)),
        _percent(row["data_wait_s"] / row["step_s"]),
        _percent(row["padding_ratio"]),
    ]
    return [*map(str, head), *cells, *(_gib(value) for value in (row["peak_gib"], predicted["peak_gib"]))]


def communication(row: Row) -> float | None:
    """Return the share of a step that the dry run, which does not communicate, would save.

    The dry run updates the weights once per micro-batch, so the share is a lower bound if a step has several.
    """
    if not row["predicted"] or row["predicted"]["step_s"] is None:
        return None
    micro_batches = row["global_batch"] / (row["ranks"] * row["micro_batch"])
    return max(0.0, 1 - micro_batches * row["predicted"]["step_s"] / row["step_s"])


def _hours(row: Row, gpu: str) -> str:
    if "failed" in row:
        return ""
    hours = PAPER_STEPS * row["step_s"] / 3600
    line = f"{row['model']}: {hours:.1f} hours for {PAPER_STEPS} steps"
    if peak := peak_flops(gpu):
        estimate = hours * peak / PEAK_FLOPS["A100"]
        line += f"; estimate for as many A100s at the same MFU: {estimate:.0f} hours"
    return line


def _scaling(rows: list[Row]) -> str:
    """Return the samples per second of each rank, relative to the smallest number of ranks."""
    base = min(rows, key=lambda row: row["ranks"])
    per_rank = base["samples_per_s"] / base["ranks"]
    body = [
        [str(row["ranks"]), f"{row['samples_per_s']:.1f}", f"{row['samples_per_s'] / row['ranks'] / per_rank:.1%}"]
        for row in rows
    ]
    return _markdown(["ranks", "samples/s", "efficiency"], body)


def _resumes(found: Row) -> str:
    starts = {name: found[name] for name in STARTS if name in found}
    phases = list(dict.fromkeys(phase for start in starts.values() for phase in start["parts"]))
    body = []
    for name, start in starts.items():
        parts = [f"{start['parts'][phase]:.1f}" if phase in start["parts"] else "" for phase in phases]
        losses = ", ".join(f"{step}: {loss:.4f}" for step, loss in start.get("losses", {}).items())
        body.append([STARTS[name], *parts, f"{start['first_step_s']:.1f}", losses])
    text = [_markdown(["s", *phases, "until the first step is done", "text losses by step"], body)]
    if save := found.get("save"):
        text.append(f"save: {save['whole_s']:.1f} s, training stalled for {save['stall_s']:.1f} s")
    if lost := found.get("lost_rank"):
        text.append(
            f"one rank killed: the others ended after {lost['others_ended_s']:.1f} s, {lost['outcome']['outcome']}"
        )
    if stop := found.get("stop"):
        text.append(f"stop by a file: {stop['outcome']} after {stop['seconds']:.1f} s, exit code {stop['exit_code']}")
    return "\n\n".join(text)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])
