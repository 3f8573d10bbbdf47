"""Figures of a run: losses and wall time across restarts, and a grid of answered questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from pipeline.metrics.history import History
from preprocess.images.codec import decode_rgb
from preprocess.progress import format_duration

LABELLED_RESTARTS = 8  # only the last restarts get a label, because more labels would overlap
MAX_SMOOTHING = 50  # maximum number of points in the running median
PART_COLOURS = {
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
TEXT_COLOUR, ALIGN_COLOUR, WARNING_COLOUR = "#1f4e79", "#9c4a1a", "#d62728"


def draw_run(history: History, path: Path) -> None:
    """Draw the losses, restarts and spikes of a run, and what its wall time was spent on. Writes a PNG."""
    has_align = any(align is not None for _, align in history.losses.values())
    heights = [3, 2, 0.3] if has_align else [4, 0.3]
    figure = Figure(figsize=(10, 1.2 + sum(heights)), layout="constrained")
    *panels, bar = figure.subplots(len(heights), height_ratios=heights)
    curves = ((0, "text", TEXT_COLOUR), (1, "align", ALIGN_COLOUR))
    for axes, (term, name, colour) in zip(panels, curves, strict=False):
        _draw_loss(axes, history, term, name=name, colour=colour)
    for axes in panels[1:]:
        axes.sharex(panels[0])
    _mark_restarts(panels, history)
    _mark_spikes(panels[0], history)
    panels[0].legend(loc="upper right", fontsize=8, frameon=False, ncols=4)
    panels[-1].set_xlabel("step")
    _draw_wall_time(bar, history)
    figure.savefig(path, dpi=120)


def _draw_loss(axes: Any, history: History, term: int, *, name: str, colour: str) -> None:
    """Draw one term of the loss (0: text, 1: align): each logged step, a smoothed curve, and the validations."""
    steps, values = _finite_points(history.losses, term)
    axes.plot(steps, values, ".", ms=2, color=colour, alpha=0.35)
    axes.plot(steps, _smooth(values), lw=1.5, color=colour, label=f"{name} loss")
    if history.heldout:
        heldout_steps, heldout_values = _finite_points(history.heldout, term)
        axes.plot(heldout_steps, heldout_values, "o--", ms=5, mfc="white", lw=0.8, color="black", label="held out")
    axes.set_ylabel(f"{name} loss")
    if values and max(values) > 3 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _finite_points(losses: dict[int, tuple[float, float | None]], term: int) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a loss term, in order, without the steps whose value is not finite."""
    values = [(step, both[term]) for step, both in sorted(losses.items())]
    points = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """Return the running median over a window of a twentieth of the points, but at most MAX_SMOOTHING points.

    A running mean would be distorted by rare kinds of batches.
    """
    reach = min(MAX_SMOOTHING, len(values) // 20) // 2
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mark_restarts(panels: list[Any], history: History) -> None:
    for start in history.starts[1:]:
        for axes in panels:
            axes.axvline(start.step, color="grey", ls="--", lw=0.8, zorder=0)
    for start in history.starts[1:][-LABELLED_RESTARTS:]:
        label = start.before.partition(":")[0].partition(" ")[0]
        position = {"xy": (start.step, 1.0), "xycoords": ("data", "axes fraction")}
        panels[0].annotate(label, **position, fontsize=7, color="grey", ha="center", va="bottom")


def _mark_spikes(axes: Any, history: History) -> None:
    """Mark spikes on the curve. A step that was not logged is drawn at the loss of the last logged step before it."""
    logged = sorted(history.losses)
    for steps, marker, label in (
        ([spike.step for spike in history.spikes.values()], "^", "spike"),
        (history.nonfinite, "x", "not finite"),
    ):
        marked = sorted(set(steps))
        nearest = [max((s for s in logged if s <= step), default=None) for step in marked]
        points = [(step, history.losses[at][0]) for step, at in zip(marked, nearest, strict=True) if at]
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            axes.plot(*zip(*finite, strict=True), marker, ms=6, color=WARNING_COLOUR, ls="none", label=label)


def _draw_wall_time(axes: Any, history: History) -> None:
    """Draw the wall time as one bar, with a colour for each part."""
    ledger, left = history.ledger, 0.0
    total = ledger.total or 1.0
    for name, seconds in sorted(ledger.parts.items(), key=lambda part: -part[1]):
        if share := seconds / total:
            label = f"{name.replace('_', ' ')} {share:.1%}" if share >= 0.001 else None
            axes.barh(0, share, left=left, color=PART_COLOURS[name], label=label)
            left += share
    axes.set(xlim=(0, 1), title=f"{format_duration(ledger.total)} of wall time, goodput {ledger.goodput:.1%}")
    axes.title.set_fontsize(9)
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, fontsize=8, frameon=False)


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question about an image file, with the model's answer and the true one."""

    image: Path
    question: str
    answer: str
    truth: str


def draw_answers(answered: Sequence[AnsweredQuestion], path: Path, *, columns: int) -> None:
    """Draw a grid of images with question and answer, green if it is correct, otherwise red. Writes a PNG."""
    rows = -(-len(answered) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.2 * rows), layout="constrained")
    for axes, each in zip(figure.subplots(rows, columns).flat, answered, strict=True):
        axes.imshow(decode_rgb(each.image.read_bytes()))
        axes.axis("off")
        correct = each.answer == each.truth
        verdict = "correct" if correct else f"truth: {each.truth}"
        colour = "tab:green" if correct else "tab:red"
        axes.set_title(f"{each.question}\n{each.answer} ({verdict})", color=colour, fontsize=10)
    figure.savefig(path, dpi=90)
