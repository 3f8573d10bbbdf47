"""Figure of benchmark scores: bars of a model next to those of the results that the paper reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.evaluation.benchmarks import BENCHMARKS, PAPER_MODELS

COLOURS = {"EMMA-V1": "#8fb3d9", "EMMA-V2": "#4a7ab5", "Cobra": "#c9c9c9"}
OWN_COLOUR = "#2f7d4f"
MME_POINTS_PER_PERCENT = 28.0  # the full score of MME is 2800


def draw_benchmarks(results: dict[str, Any], path: Path) -> None:
    """Draw a group of bars for each benchmark, in percent of its full score. Writes a PNG."""
    names = [name for name in BENCHMARKS if name in results["benchmarks"]]
    figure = Figure(figsize=(max(5.0, 0.95 * len(names)), 4), layout="constrained")
    axes = figure.subplots()
    bars = {"this model": [results["benchmarks"][name]["score"] for name in names]}
    for number, model in enumerate(PAPER_MODELS):
        bars[model] = [BENCHMARKS[name].paper[number] if BENCHMARKS[name].paper else 0.0 for name in names]
    for number, (model, scores) in enumerate(bars.items()):
        units = [MME_POINTS_PER_PERCENT if name == "mme" else 1.0 for name in names]
        heights = [score / unit for score, unit in zip(scores, units, strict=True)]
        places = [group + (number - 1.5) / 5 for group in range(len(names))]
        drawn = axes.bar(places, heights, 0.18, color=COLOURS.get(model, OWN_COLOUR), label=model)
        if model not in COLOURS:
            axes.bar_label(drawn, [f"{score:.0f}" for score in scores], fontsize=8, padding=2)
    labels = [BENCHMARKS[name].column + " (of 2800)" * (name == "mme") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=30, ha="right")
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 100), ylabel="% of the full score")
    axes.grid(axis="y", alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=4, frameon=False, fontsize=8, loc="outside upper left")
    figure.savefig(path, dpi=120)
