#!/usr/bin/env python
"""Train EMMA from shards. The same command resumes.

    sbatch slurm/train_emma.sh pipeline/recipes/emma_v2.toml data.shards=/data/shards run.dir=/runs/v2
    torchrun --nproc-per-node 2 -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN
    python -m pipeline.train pipeline/recipes/demo.toml data.shards=SHARDS run.dir=RUN     # one rank

Exit codes:
    0  finished, or stopped on request (RUN/outcome.json says which)
    1  a bug; the traceback is printed
    2  an error in the command, the recipe or the data, which the user can fix
    3  the training failed, and a retry would fail in the same way
    4  a rank was lost or hung, or the file system failed; the same command may succeed on a retry
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
import torch.distributed as dist

from model.emma import Emma
from model.errors import accept_any_character, use_writable_caches
from model.vision import Towers
from pipeline.activation_memory import fit_kept_layers
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import CHECKPOINTS, list_steps
from pipeline.checkpoint.manifest import Identity
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.resumer import Resumer
from pipeline.checkpoint.saver import Saver
from pipeline.data.loader import TrainData
from pipeline.distributed.collectives import broadcast_from_main, collectively
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import Engine, build_engine, init_distributed
from pipeline.initial_model import RANDOM, check_towers_unchanged, empty_model, initial_model, make_towers
from pipeline.loop import Loop
from pipeline.metrics.logger import MetricsLogger
from pipeline.metrics.timers import StartupTimer
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.failure import exit_after
from pipeline.run.folder import RunFolder
from pipeline.run.out_of_memory import explain_out_of_memory
from pipeline.run.preflight import preflight
from pipeline.run.watchdog import Watchdog, set_collective_timeouts, time_limit
from pipeline.validation import Validation
from pipeline.visualization.held_out import HeldOutImages
from pipeline.zero import check_partition

RENDEZVOUS_S = 600.0  # time limit for all ranks to join


def main() -> None:
    accept_any_character()
    use_writable_caches()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file, such as those in pipeline/recipes")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set a key of the recipe, for example optim.lr=1e-5"
    )
    args = parser.parse_args()
    # DeepSpeed calls collectives by names that newer versions of torch deprecate.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    startup = StartupTimer()
    startup.phase_done("imports")
    recipe: Recipe | None = None
    ranks: Ranks | None = None
    run: RunFolder | None = None
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        ranks = find_ranks(recipe.engine.device)
        set_collective_timeouts(recipe)
        with time_limit(RENDEZVOUS_S, "the ranks' rendezvous", ranks):
            init_distributed(ranks)
        startup.phase_done("meeting")
        notes = preflight(recipe, ranks)
        if ranks.is_main and notes:
            print("\n".join(notes), flush=True)
        run = collectively(ranks, lambda: RunFolder(recipe, ranks))
        startup.phase_done("preflight")
        train(run, ranks, startup)
    except Exception as error:
        exit_after(error, recipe, ranks, run)
    dist.barrier()
    dist.destroy_process_group()


def train(run: RunFolder, ranks: Ranks, startup: StartupTimer) -> None:
    """Build data, model and engine, resume from the newest good checkpoint, and train. Must be called on every rank."""
    recipe = run.recipe
    saved_steps = broadcast_from_main(ranks, lambda: list_steps(run.folder / CHECKPOINTS))
    with Watchdog(run, ranks) as watchdog, explain_out_of_memory(recipe, ranks):
        run.control.stop_on_signals()
        data = collectively(ranks, lambda: TrainData(recipe, ranks))
        validation = collectively(ranks, lambda: Validation(recipe, ranks) if recipe.evaluate.shards else None)
        held_out = validation.data if validation and recipe.evaluate.draw_every_steps else None
        drawings = collectively(ranks, lambda: HeldOutImages(recipe, held_out) if held_out else None)
        data.start_workers(max(saved_steps, default=0))
        startup.phase_done("data")
        emma, towers, loaded = collectively(ranks, lambda: build_model(run, ranks, resume=bool(saved_steps)))
        startup.phase_done("model")
        engine = build_engine(emma, recipe, ranks)
        check_partition(engine)
        startup.phase_done("engine")
        probe = Probe(engine, towers, recipe, ranks, data)
        identity = training_identity(recipe, data)
        context = CheckpointContext(recipe=recipe, ranks=ranks, identity=identity, engine=engine, probe=probe)
        step, notes = Resumer(context).resume(saved_steps)
        startup.phase_done("checkpoint")
        # Measure only after the weights are loaded, because uninitialized weights could leave a NaN in a buffer.
        notes = [*fit_memory(engine, towers, recipe, data), *notes]
        startup.phase_done("memory")
        run.accept_start(step, loaded)
        with MetricsLogger(recipe, ranks, data) as metrics, watchdog.allow_time_to_finish():
            metrics.log_start(step, startup, notes)
            loop = Loop(
                run_folder=run,
                engine=engine,
                towers=towers,
                data=data,
                validation=validation,
                drawings=drawings,
                saver=Saver(context, resumed_from=step),
                metrics=metrics,
                watchdog=watchdog,
            )
            step = loop.run(step)
            if ranks.is_main:
                record_end(run, metrics, step, finished=step == data.total_steps)


def build_model(run: RunFolder, ranks: Ranks, *, resume: bool) -> tuple[Emma, Towers, dict[str, Any]]:
    """Return the model to train, the frozen towers, and which weights were loaded from where.

    In a new run, only the main rank loads the language model, because the engine broadcasts it to the other ranks. A
    run that resumes loads all trained weights from its checkpoint later.
    """
    recipe = run.recipe
    if ranks.is_main and not resume:
        emma, towers, loaded = initial_model(recipe)
    else:
        emma, towers = empty_model(recipe.config), make_towers(recipe)
        loaded = {"llm": "from a checkpoint", "towers": towers.loaded or RANDOM}
    if ranks.is_main:
        check_towers_unchanged(run.weights_file, towers)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    return emma, towers.to(ranks.device, dtype), loaded


def training_identity(recipe: Recipe, data: TrainData) -> Identity:
    return Identity(
        recipe=recipe.identity(),
        fingerprint=recipe.fingerprint(),
        shards_sha256=data.reader.manifest.sha256,
        total_steps=data.total_steps,
    )


def fit_memory(engine: Engine, towers: Towers, recipe: Recipe, data: TrainData) -> list[str]:
    """Recompute as few layers as the recipe's memory budget allows, if it has one. Return lines for the log."""
    if recipe.engine.memory_gib is None:
        return []
    return [fit_kept_layers(engine, towers, recipe, data.heaviest_micro_batch(), recipe.engine.memory_gib)]


def record_end(run: RunFolder, metrics: MetricsLogger, step: int, *, finished: bool) -> None:
    """Log and write the outcome, then clear the stop request. Main rank only.

    The outcome is written before wandb finishes, because that can take long and the batch script needs the outcome to
    decide whether to requeue. The stop request is cleared last, because it contains the reason.
    """
    outcome, reason = ("done", "") if finished else ("stopped", run.control.stop_reason())
    metrics.log_event(outcome, step, **({"reason": reason} if reason else {}))
    run.write_outcome(outcome, step=step, reason=reason)
    run.control.clear("stop")


if __name__ == "__main__":
    main()
