"""A run at a glance: both losses across restarts, what stands out in them, and where the wall time went."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from model.errors import UserError
from pipeline.metrics.history import History, hours

LABELLED = 8  # restarts, the last ones; more would stand on each other
SMOOTHED = 50  # points of the curve at most that a point of the smoothed one is made of
COLOURS = {
    "training": "#2f7d4f",
    "waiting_for_data": "#e0a030",
    "redone_steps": "#c8553d",
    "saving": "#4a7ab5",
    "evaluating": "#7b61a8",
    "starting": "#8fb3d9",
    "resuming": "#b9cfe4",
    "queued": "#c9c9c9",
    "down": "#7a7a7a",
    "other": "#e6e0d4",
}
TEXT, ALIGN = "#1f4e79", "#9c4a1a"


def draw(history: History, path: Path) -> None:
    """Write a PNG. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install matplotlib") from None
    has_align = any(align is not None for _, align in history.losses.values())
    heights = [3, 2, 0.3] if has_align else [4, 0.3]
    figure = Figure(figsize=(10, 1.2 + sum(heights)), layout="constrained")
    *panels, bar = figure.subplots(len(heights), height_ratios=heights)
    for place, (axes, name, colour) in enumerate(zip(panels, ("text", "align"), (TEXT, ALIGN), strict=False)):
        _draw_loss(axes, history, place, name, colour)
    for axes in panels[1:]:
        axes.sharex(panels[0])
    _mark_restarts(panels, history)
    _mark_spikes(panels[0], history)
    panels[0].legend(loc="upper right", fontsize=8, frameon=False, ncols=4)
    panels[-1].set_xlabel("step")
    _draw_wall_time(bar, history)
    figure.savefig(path, dpi=120)


def _draw_loss(axes: Any, history: History, place: int, name: str, colour: str) -> None:
    steps, values = _points(history.losses, place)
    axes.plot(steps, values, ".", ms=2, color=colour, alpha=0.35)
    axes.plot(steps, _smoothed(values), lw=1.5, color=colour, label=f"{name} loss")
    if history.heldout:
        held_steps, held_values = _points(history.heldout, place)
        axes.plot(held_steps, held_values, "o--", ms=5, mfc="white", lw=0.8, color="black", label="held out")
    axes.set_ylabel(f"{name} loss")
    if values and max(values) > 3 * min(values) > 0:
        _scale_by_factors(axes)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_by_factors(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _points(losses: dict[int, tuple[float, float | None]], place: int) -> tuple[list[int], list[float]]:
    """Steps and values that can be drawn, by step."""
    found = [(step, both[place]) for step, both in sorted(losses.items())]
    finite = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _smoothed(values: list[float]) -> list[float]:
    """A running median around each point, over a twentieth of all points: rare kinds of batches do not move it."""
    reach = min(SMOOTHED, len(values) // 20) // 2
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mark_restarts(panels: list[Any], history: History) -> None:
    for start in history.starts[1:]:
        for axes in panels:
            axes.axvline(start.step, color="grey", ls="--", lw=0.8, zorder=0)
    for start in history.starts[1:][-LABELLED:]:
        label = start.before.partition(":")[0].partition(" ")[0]
        place = {"xy": (start.step, 1.0), "xycoords": ("data", "axes fraction")}
        panels[0].annotate(label, **place, fontsize=7, color="grey", ha="center", va="bottom")


def _mark_spikes(axes: Any, history: History) -> None:
    """On the curve, at the step's own loss if a line has it, else at that of the line before."""
    logged = sorted(history.losses)
    for steps, marker, colour, label in (
        ([spike.step for spike in history.spikes.values()], "^", "#d62728", "spike"),
        (history.nonfinite, "x", "#d62728", "not finite"),
    ):
        near = [max((s for s in logged if s <= step), default=None) for step in sorted(set(steps))]
        points = [(step, history.losses[at][0]) for step, at in zip(sorted(set(steps)), near, strict=True) if at]
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            axes.plot(*zip(*finite, strict=True), marker, ms=6, color=colour, ls="none", label=label)


def _draw_wall_time(axes: Any, history: History) -> None:
    """One bar, a colour for each part of the wall time."""
    total, left = history.ledger.total or 1.0, 0.0
    for name, seconds in sorted(history.ledger.parts.items(), key=lambda part: -part[1]):
        if share := seconds / total:
            label = f"{name.replace('_', ' ')} {share:.1%}"
            axes.barh(0, share, left=left, color=COLOURS[name], label=label if share >= 0.001 else None)
            left += share
    axes.set(xlim=(0, 1), title=f"{hours(history.ledger.total)} of wall time, goodput {history.ledger.goodput:.1%}")
    axes.title.set_fontsize(9)
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, fontsize=8, frameon=False)
