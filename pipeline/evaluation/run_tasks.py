"""The evaluation of a model on the paper's benchmarks: checks, ranks, results, and the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.errors import UserError
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.evaluation import report
from pipeline.evaluation.benchmarks import BENCHMARKS, Benchmark, check_data, choose
from pipeline.evaluation.harness import require_lmms_eval, run_benchmark
from pipeline.inference.journal import answer_key
from preprocess.atomic import publish, write_json

CARD = "README.md"
RANKS_WAIT = timedelta(hours=24)  # ranks wait for each other after each benchmark


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to evaluate, and where.

    Attributes:
        data: Folder with the data sets, as pipeline.prefetch writes it.
        out: Folder for the journal and the results.
        batch: Largest number of questions that are answered together.
        card: Whether to write the table into the model's README.md.
    """

    model: Path
    names: Sequence[str]
    data: Path
    out: Path
    device: str
    batch: int
    card: bool


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an evaluation on benchmarks to the command's parser."""
    group = parser.add_argument_group("benchmarks of the paper", "They need the extra [eval]. See docs/evaluation.md.")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help=f"all, or some of: {', '.join(BENCHMARKS)}")
    group.add_argument("--data", type=Path, metavar="DIR", help="folder that pipeline.prefetch --benchmarks wrote")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for answers and results (default: MODEL-evaluation)"
    )
    group.add_argument("--card", action="store_true", help="also write the table into the model's README.md")


def task_options(args: argparse.Namespace) -> TaskOptions | None:
    """Return the options of an evaluation on benchmarks, or None if the command names a file of questions instead.

    Raises: UserError if the command names both or neither, or if --data is missing.
    """
    if args.batch < 1:
        raise UserError(f"--batch: found {args.batch}, expected 1 or more")
    if bool(args.tasks) == bool(args.questions):
        found = "both" if args.tasks else "neither"
        raise UserError(f"evaluate: found {found}, expected either a file of questions or --tasks. See --help")
    if not args.tasks:
        return None
    if not args.data:
        raise UserError(
            "--tasks: give the folder of the data sets as --data DIR. pipeline.prefetch --benchmarks fills it"
        )
    model = Path(args.model)
    out = args.out or model.absolute().with_name(f"{model.absolute().name}-evaluation")
    return TaskOptions(
        model=model, names=args.tasks, data=args.data, out=out, device=args.device, batch=args.batch, card=args.card
    )


def run_tasks(options: TaskOptions, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Evaluate a model on benchmarks, compare it with the paper's results in a table, and write it to `options.out`.

    Args:
        draw: Draws the figure of the results to a path.

    Raises: UserError, before the model is loaded, if a benchmark is unknown, or if its data or the card is missing.
    """
    benchmarks = choose(options.names)
    check_data(benchmarks, options.data)
    require_lmms_eval()
    if options.card:
        report.read_card(options.model / CARD)
    ranks = find_ranks("cpu" if options.device == "cpu" else "auto")
    if ranks.world_size > 1:
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size, timeout=RANKS_WAIT)
    try:
        results = _evaluate(options, benchmarks, ranks)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if ranks.is_main:
        _write(options, results, draw)


def _evaluate(options: TaskOptions, benchmarks: Sequence[Benchmark], ranks: Ranks) -> dict[str, Any]:
    """Evaluate the benchmarks one after the other. Results are saved after each, and added to those of earlier calls.

    Results of other weights or settings in the same folder are replaced.
    """
    import lmms_eval.models  # noqa: F401 (imports lmms_model itself, and warns if that import has already begun)

    from pipeline.evaluation.lmms_model import DEFAULT_MAX_NEW_TOKENS, EmmaModel

    model = EmmaModel(str(options.model), batch_size=options.batch, device=options.device)
    settings = [answer_key(options.model, model.engine, DEFAULT_MAX_NEW_TOKENS) if ranks.is_main else {}]
    if ranks.world_size > 1:
        dist.broadcast_object_list(settings)
    path = options.out / "results.json"
    results = _earlier_results(path, settings[0])
    results = results or {"model": str(options.model), "settings": settings[0], "benchmarks": {}}
    for benchmark in benchmarks:
        result = run_benchmark(model, benchmark, options.data, options.out, settings=settings[0], ranks=ranks)
        if result:
            results["benchmarks"][benchmark.name] = result
            write_json(path, results)
            print(f"{benchmark.name:<14}  score {result['score']:.1f}", flush=True)
    return results


def _earlier_results(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results in the file if they have the same weights and settings, otherwise None."""
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results if results["settings"] == settings else None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a file of results. Delete it, or choose another folder with --out") from None


def _write(options: TaskOptions, results: dict[str, Any], draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Print the table, and write it as Markdown, as a figure and, if asked for, into the model card."""
    table = report.markdown(results)
    publish(options.out / "results.md", table.encode())
    draw(results, options.out / "results.png")
    if options.card:
        report.write_card(options.model / CARD, table)
    print(f"\n{table}\nwritten to {options.out}: results.json, results.md, results.png")
