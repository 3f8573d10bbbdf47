"""The table that compares a model's scores with the paper's results, and its section in the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.errors import UserError
from pipeline.evaluation.benchmarks import BENCHMARKS, JUDGE, PAPER_MODELS, SPLIT
from preprocess.atomic import publish

BEGIN, END = "<!-- begin: benchmarks -->", "<!-- end: benchmarks -->"
MARKS = {
    SPLIT: ("ˢ", "The paper probably evaluates the test split, whose answers are not published; this is validation."),
    JUDGE: ("ʲ", "No GPT judges the answers here, so that the score can be reproduced offline."),
}


def markdown(results: dict[str, Any]) -> str:
    """Return a Markdown table with a row per benchmark: the score, and the paper's scores with the differences."""
    lines = [
        f"| benchmark | this model | {' | '.join(PAPER_MODELS)} | questions |",
        f"|---|{'---:|' * (len(PAPER_MODELS) + 2)}",
    ]
    used: list[str] = []
    for name, benchmark in BENCHMARKS.items():
        if name not in results["benchmarks"]:
            continue
        result = results["benchmarks"][name]
        marks = "".join(MARKS[kind][0] for kind in benchmark.differs)
        used += [kind for kind in benchmark.differs if kind not in used]
        paper = [f"{value:.1f} ({result['score'] - value:+.1f})" for value in benchmark.paper] or ["–"] * len(
            PAPER_MODELS
        )
        cells = [benchmark.column + marks, f"{result['score']:.1f}", *paper, f"{result['questions']}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "In brackets: this model's score minus the score that the paper reports."]
    lines += [f"{MARKS[kind][0]} {MARKS[kind][1]}" for kind in used]
    lines += [f"Weights: sha256 {results['settings']['weights_sha256']}."]
    return "\n".join(lines) + "\n"


def read_card(path: Path) -> tuple[str, str]:
    """Return the text of a model card before and after its table. Raises: UserError if there is no usable card."""
    if not path.exists():
        raise UserError(f"--card: found no model card {path}. Export the model again: python -m pipeline.export")
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    if not begin:
        return f"{before.rstrip()}\n\n", ""
    _, end, after = rest.partition(END + "\n")
    if not end:
        raise UserError(f"--card: found the line {BEGIN!r} without {END!r} in {path}. Delete that line")
    return before, after


def write_card(path: Path, table: str) -> None:
    """Write the table into a model card: replace the earlier table, or append a section. Raises: UserError."""
    before, after = read_card(path)
    publish(path, f"{before}{BEGIN}\n## Benchmarks\n\n{table}{END}\n{after}".encode())
