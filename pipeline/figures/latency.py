"""Figure of speed: tokens per second against the batch size and against the length of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter


@dataclass(frozen=True, kw_only=True)
class SpeedCurve:
    """Tokens per second of one implementation.

    name      label; curves of the same name have the same colour
    graph     whether CUDA graphs were used; without them, the curve is dashed
    points    pairs of the batch size, or of the length of the answer, and tokens per second
    """

    name: str
    graph: bool
    points: Sequence[tuple[int, float]]


def draw_speed(
    by_batch: Sequence[SpeedCurve], by_length: Sequence[SpeedCurve], path: Path, *, title: str, tokens: int
) -> None:
    """Draw the curves in two panels with logarithmic axes. Writes a PNG."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(curve.name for curve in (*by_batch, *by_length)))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for axes, curves in zip(panels, (by_batch, by_length), strict=True):
        for curve in curves:
            axes.plot(
                *zip(*sorted(curve.points), strict=True),
                marker="o",
                ms=4,
                lw=1.6,
                ls="-" if curve.graph else "--",
                color=colours[curve.name],
                label=curve.name if curve.graph else f"{curve.name}, no graph",
            )
        _style(axes, sorted({x for curve in curves for x, _ in curve.points}))
    panels[0].set(xlabel="batch size", ylabel="tokens/s", title=f"answers of {tokens} tokens")
    panels[1].set(xlabel="tokens of the answer", title="batch size 1")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _style(axes: Any, ticks: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
