"""Report of the ablation in Markdown: every run, the chosen settings, scores with spread, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from benchmarks.ablation.configs import BASELINE, VARIANTS, Run, search_runs
from benchmarks.ablation.scenes import KINDS, ORDINARY

# 97.5 % quantiles of Student's t distribution, by degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Record = dict[str, Any]  # the file of a run
ByVariant = dict[str, dict[int, Record]]  # test runs by variant and seed
Measure = Callable[[Record], float | None]


def accuracy(answers: dict[str, Any], kinds: Sequence[str] = KINDS) -> float:
    """Return the exact match over all questions of these kinds."""
    return sum(answers["right"][kind] for kind in kinds) / max(1, sum(answers["total"][kind] for kind in kinds))


def hallucinated(answers: dict[str, Any]) -> float:
    """Return the share of wrong answers to questions about what is not there.

    These are the answers other than "none" to questions of kind "absent", and "yes" to "exists" if the truth is "no".
    """
    false_yes, truly_no = answers["false_yes"]
    wrong = answers["total"]["absent"] - answers["right"]["absent"] + false_yes
    return wrong / max(1, answers["total"]["absent"] + truly_no)


def _of_kinds(*kinds: str) -> Measure:
    return lambda record: accuracy(record["test"], kinds)


MEASURES: dict[str, Measure] = {
    "all questions": _of_kinds(*KINDS),
    "ordinary questions": _of_kinds(*ORDINARY),
    **{kind: _of_kinds(kind) for kind in KINDS},
    "hallucinated": lambda record: hallucinated(record["test"]),
    "false none": lambda record: record["test"]["false_none"][0] / max(1, record["test"]["false_none"][1]),
    "reconstruction error": lambda record: record["reconstruction"],
}


def best_settings(records: Sequence[Record], size: str) -> dict[str, Run]:
    """Return for each variant the test run's settings: those of the search with the highest validation accuracy.

    A variant whose search is not complete is left out.
    """
    found = {_run(record): accuracy(record["val"]) for record in records if record["outcome"] == "done"}
    best = {}
    for variant in VARIANTS:
        grid = [run for run in search_runs(size) if run.variant == variant]
        if all(run in found for run in grid):
            best[variant] = max(grid, key=lambda run: found[run])
    return best


def _run(record: Record) -> Run:
    return Run(**record["run"])


def paired_difference(values: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % confidence interval."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = T_QUANTILES[min(len(values) - 2, len(T_QUANTILES) - 1)] * stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def report(records: Sequence[Record], size: str, *, others: int) -> str:
    """Return the whole report.

    Args:
        others: Number of run files that are not in the tables.
    """
    done = [record for record in records if record["outcome"] == "done"]
    by_variant: ByVariant = {}
    for variant in VARIANTS:
        final = [r for r in done if r["run"]["variant"] == variant and not _run(r).is_search]
        if final:
            by_variant[variant] = {record["run"]["seed"]: record for record in final}
    parts = ["## Runs", _runs_table(records), "## Search", _search_table(done, size)]
    if others:
        parts.insert(2, f"{others} other runs were started, with another size or before the program changed.")
    if by_variant:
        parts += ["## Test questions", _scores_table(by_variant)]
        for other in filter(by_variant.__contains__, (BASELINE, "emma")):
            parts += [f"## Paired differences from `{other}`", _differences_table(by_variant, other)]
        parts += ["## What linear probes read at each depth", _probes_table(by_variant)]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _runs_table(records: Sequence[Record]) -> str:
    """Count all runs that were ever started, by variant and outcome."""
    outcomes = ("done", "interrupted", "failed", "started")
    rows = []
    for variant in VARIANTS:
        for stage, is_search in (("search", True), ("test", False)):
            found = [r for r in records if r["run"]["variant"] == variant and _run(r).is_search == is_search]
            counts = [sum(record["outcome"] == outcome for record in found) for outcome in outcomes]
            errors = sum("error" in attempt for record in found for attempt in record["attempts"])
            times = [record["seconds"] for record in found if record["outcome"] == "done"]
            rows.append(
                [
                    variant,
                    stage,
                    str(len(found)),
                    *map(str, counts),
                    str(errors),
                    f"{fmean(times):.0f}" if times else "",
                ]
            )
    header = ["variant", "stage", "started", *outcomes[:-1], "cut off", "failed attempts", "training s per run"]
    return _table(header, rows)


def _search_table(done: Sequence[Record], size: str) -> str:
    """Show the validation accuracy at each point of the grid; the chosen one is bold."""
    best = best_settings(done, size)
    found = {_run(record): accuracy(record["val"]) for record in done}
    rows = []
    for variant in VARIANTS:
        for run in (run for run in search_runs(size) if run.variant == variant):
            value = f"{found[run]:.3f}" if run in found else "not done"
            value = f"**{value}**" if best.get(variant) == run else value
            factor = f"{run.align_factor:g}" if variant != "cobra" else "-"
            rows.append([variant, f"{run.lr:g}", factor, value])
    return _table(["variant", "learning rate", "alignment factor", "validation accuracy"], rows)


def _scores_table(by_variant: ByVariant) -> str:
    """Show mean ± standard deviation over the seeds, and the score of the most common answer of each kind."""
    answers = next(iter(next(iter(by_variant.values())).values()))["test"]
    rows = []
    for name, measure in MEASURES.items():
        cells = []
        for records in by_variant.values():
            values = [value for record in records.values() if (value := measure(record)) is not None]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}" if values else "-")
        kinds = [name] if name in KINDS else {"all questions": KINDS, "ordinary questions": ORDINARY}.get(name, [])
        common = sum(answers["most_common"][kind] for kind in kinds) / max(1, sum(answers["total"][k] for k in kinds))
        rows.append([name, *cells, f"{common:.3f}" if kinds else "-"])
    seeds = [f"{variant} ({len(records)} seeds)" for variant, records in by_variant.items()]
    return _table(["", *seeds, "most common answer"], rows)


def _differences_table(by_variant: ByVariant, other: str) -> str:
    """Show mean and 95 % interval of the differences from another variant with the same seed."""
    variants = [variant for variant in by_variant if variant != other]
    rows = []
    for name, measure in MEASURES.items():
        cells = []
        for variant in variants:
            seeds = sorted(by_variant[variant].keys() & by_variant[other].keys())
            pairs = [(measure(by_variant[variant][seed]), measure(by_variant[other][seed])) for seed in seeds]
            values = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
            cells.append(paired_difference(values) if values else "-")
        rows.append([name, *cells])
    return _table(["", *variants], rows)


def _probes_table(by_variant: ByVariant) -> str:
    """Show what a linear probe reads at each depth: the mean over the seeds."""
    depths = list(next(iter(next(iter(by_variant.values())).values()))["probes"])
    rows = []
    for probe in ("position", "colour", "pixels"):
        for variant, records in by_variant.items():
            means = [fmean(record["probes"][depth][probe] for record in records.values()) for depth in depths]
            rows.append([probe, variant, *(f"{mean:.3f}" for mean in means)])
    return _table(["probe", "variant", *depths], rows)


def final_runs(best: dict[str, Run], seeds: int) -> list[Run]:
    """Return the test runs with the chosen settings, seed by seed, so that an early end leaves complete pairs."""
    return [replace(run, seed=seed) for seed in range(seeds) for run in best.values()]
