#!/usr/bin/env python
"""Train EMMA from shards. The same command resumes.

    sbatch slurm/train_emma.sh pipeline/recipes/emma_v2.toml data.shards=/data/shards run.dir=/runs/v2
    torchrun --nproc-per-node 2 -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN
    python -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN     # one rank

Exit codes: 0 done, or stopped on request (run.dir/outcome.json says which); 2 a mistake that you can mend; 3 the
training failed in a way that trying again would not mend.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from model.emma import Emma
from model.errors import UserError
from model.vision import Towers
from pipeline.checkpoint import Checkpoints, Identity
from pipeline.control import Control
from pipeline.data import DamagedShardError, TrainData
from pipeline.engine import build_engine, check_partition, init_distributed, learning_rate
from pipeline.files import write_json
from pipeline.metrics import Metrics
from pipeline.preflight import preflight
from pipeline.pretrained import empty_model, initial_model, make_towers
from pipeline.ranks import Ranks, find_ranks
from pipeline.recipe import Recipe, load_recipe
from pipeline.step import optimizer_step

BEGAN = time.time()
MAX_NONFINITE = 3  # steps in a row without a finite loss and gradient, after which the run has failed


class DivergedError(RuntimeError):
    """No finite loss or gradient for several steps; the same command would fail again at the same place."""


def train(recipe: Recipe, ranks: Ranks) -> tuple[str, int]:
    """Run the recipe to its end or to a stop request: ("done" or "stopped", steps done). Every rank calls it."""
    for line in preflight(recipe, ranks):
        say(ranks, line)
    data = TrainData(recipe, ranks)
    folder, control = open_run(recipe, ranks)
    emma, towers = build_model(recipe, ranks, folder)
    engine = build_engine(emma, recipe, ranks)
    check_partition(engine)
    checkpoints = Checkpoints(recipe, ranks, _identity(recipe, data))
    with Metrics(recipe, ranks, data.total_steps) as metrics:
        step, report = checkpoints.resume(engine)
        metrics.started(step, BEGAN, report)
        step = train_steps(engine, towers, recipe, data, step, checkpoints, control, metrics)
        outcome = "done" if step == data.total_steps else "stopped"
        metrics.event(outcome, step)
        return outcome, step


def train_steps(
    engine: Any,
    towers: Towers,
    recipe: Recipe,
    data: TrainData,
    step: int,
    checkpoints: Checkpoints,
    control: Control,
    metrics: Metrics,
) -> int:
    """The loop, from `step` on; returns the steps done when it ended."""
    nonfinite = 0
    for batch in data.from_step(step):
        lr = learning_rate(recipe, step, data.total_steps)
        report = optimizer_step(engine, towers, recipe, batch, lr, control.requests())
        step += 1
        metrics.log(step, step / data.plan.steps_per_epoch, batch, report, lr)
        nonfinite = 0 if report.finite else nonfinite + 1
        if nonfinite:
            metrics.event("nonfinite", step, samples=batch.ids.tolist())
        if nonfinite == MAX_NONFINITE:
            raise DivergedError(f"no finite loss or gradient in steps {step - nonfinite + 1} to {step}")
        if checkpoints.due(step) or report.stop or report.save or step == data.total_steps:
            begun = time.monotonic()
            checkpoints.save(engine, step)
            metrics.event("save", step, seconds=round(time.monotonic() - begun, 2))
            control.done("save")
        if report.stop:
            control.done("stop")
            break
    return step


def open_run(recipe: Recipe, ranks: Ranks) -> tuple[Path, Control]:
    """Make the run folder and put the resolved recipe into it. Raises: UserError if it cannot be written."""
    folder = Path(recipe.run.dir)
    control = Control(folder)
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            control.clear()
            (folder / "outcome.json").unlink(missing_ok=True)
            write_json(folder / "recipe.json", asdict(recipe))
        except OSError as error:
            raise UserError(f"run.dir: {folder}: cannot be written ({error}); give a folder that you own") from None
    dist.barrier()
    control.stop_on_sigterm()
    return folder, control


def build_model(recipe: Recipe, ranks: Ranks, folder: Path) -> tuple[Emma, Towers]:
    """The model that trains and the frozen towers. Only the main rank reads weights; the engine broadcasts them."""
    if ranks.is_main:
        emma, towers = initial_model(recipe, record=folder / "weights.json")
    else:
        emma, towers = empty_model(recipe.config), make_towers(recipe)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    return emma, towers.to(ranks.device, dtype)


def say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, flush=True)


def _identity(recipe: Recipe, data: TrainData) -> Identity:
    return Identity(recipe.identity(), recipe.fingerprint(), data.reader.manifest.sha256, data.total_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file; pipeline/recipes has the ones that ship")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in optim.lr=1e-5")
    args = parser.parse_args()
    run_dir: Path | None = None
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        run_dir = Path(recipe.run.dir)
        ranks = find_ranks(recipe.engine.device)
        init_distributed(ranks)
        outcome, step = train(recipe, ranks)
    except UserError as error:
        fail(error, run_dir, code=2)
    except DivergedError as error:
        fail(error, run_dir, code=3)
    if ranks.is_main:
        write_json(run_dir / "outcome.json", {"outcome": outcome, "step": step, "reason": ""})
    dist.barrier()
    dist.destroy_process_group()


def fail(error: Exception, run_dir: Path | None, code: int) -> NoReturn:
    """One line on the console, an outcome that says not to try again, and an exit code. Never a traceback."""
    is_main = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    if is_main or isinstance(error, DamagedShardError):  # all ranks meet every other mistake; the main one speaks
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run_dir is not None and run_dir.is_dir() and os.access(run_dir, os.W_OK):
            write_json(run_dir / "outcome.json", {"outcome": "failed", "step": None, "reason": str(error)})
    # Other ranks may wait in a collective for this one: leave without the goodbyes that would wait for them.
    os._exit(code)


if __name__ == "__main__":
    main()
