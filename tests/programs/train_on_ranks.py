"""A short training that records data for tests: step reports, gradients, and training states as DeepSpeed reads them.

    torchrun … tests/programs/train_on_ranks.py [OPTIONS] OUT RECIPE [key=value …]

The main rank saves a dict to OUT:
    reports     the report of each step, with the learning rates and whether this rank was still writing a checkpoint
    gradients   without --states: for each step, {name: unsharded gradient before clipping}
    states      with --states: {step: masters, moments, groups and update counts}, after resuming and at each save
    first       the step from which the training resumed, or 0
    notes       the lines that the resumer printed
    untrained   the update count in a snapshot taken before the first step, or None after resuming
"""

import argparse
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

from model.vision import Towers
from pipeline import step
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import list_steps
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.resumer import Resumer
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import build_engine, init_distributed
from pipeline.lr_schedule import learning_rate
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.folder import RunFolder
from pipeline.train import build_model, training_identity

row_losses = step.row_losses
WAIT_S = 60.0  # longest time to wait for another rank or for the end of the training
SLACK_BYTES = 1 << 20  # less than the checkpoint bytes of one rank


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--until", type=int, metavar="STEP", help="stop after this step without saving")
    parser.add_argument("--states", action="store_true", help="record states instead of gradients")
    parser.add_argument("--hold-writes", action="store_true", help="write no checkpoint file before the last step")
    parser.add_argument(
        "--fill-disk", type=Path, metavar="FILE", help="leave space for one checkpoint; rank 0 writes last"
    )
    parser.add_argument(
        "--infinite-loss", type=int, metavar="STEP", help="0-based step with an infinite loss on rank 0"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks)
    data = TrainData(recipe, ranks)
    context, towers, first, notes = build_and_resume(recipe, ranks, data)
    engine = context.engine
    kept: dict[str, Any] = {"first": first, "notes": notes, "reports": [], "states": {}}
    kept["untrained"] = None if first else context.snapshot.take()
    kept["gradients"] = [] if arguments.states else record_gradients(engine)
    if arguments.states and first:
        kept["states"][first] = state_of(engine)
    if arguments.fill_disk and ranks.is_main:
        fill_disk(arguments.fill_disk, but_for=context.total_bytes + SLACK_BYTES)
        write_last(context)
    saver = Saver(context, resumed_from=first)
    release_writes = hold_writes() if arguments.hold_writes else threading.Event()
    for batch in data.from_step(first):
        make_loss_infinite(batch.step == arguments.infinite_loss and ranks.is_main)
        lr = learning_rate(recipe, batch.step, data.total_steps)
        losses = step.optimizer_step(engine, towers, recipe, batch, lr)
        report = step.reduce_step(losses, step.Requests(), step.Timings())
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        kept["reports"].append(vars(report) | {"writing_here": saver.writing, "learning_rates": rates})
        if saver.due(batch.step + 1):
            saver.save(batch.step + 1)
            if arguments.states:
                kept["states"][batch.step + 1] = state_of(engine)
        if batch.step + 1 == arguments.until:
            break
    release_writes.set()
    saver.finish()
    if ranks.is_main:
        torch.save(kept, arguments.out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build_and_resume(recipe: Recipe, ranks: Ranks, data: TrainData) -> tuple[CheckpointContext, Towers, int, list[str]]:
    """Return the checkpoint context, the towers, the step to resume from, and the lines that the resumer printed."""
    run = RunFolder(recipe, ranks)
    saved_steps = list_steps(run.folder / "checkpoints")
    emma, towers, _ = build_model(run, ranks, resume=bool(saved_steps))
    engine = build_engine(emma, recipe, ranks)
    context = CheckpointContext(
        recipe=recipe,
        ranks=ranks,
        identity=training_identity(recipe, data),
        engine=engine,
        probe=Probe(engine, towers, recipe, ranks, data),
    )
    return context, towers, *Resumer(context).resume(saved_steps)


def record_gradients(engine) -> list[dict[str, torch.Tensor]]:
    """Return a list to which each optimizer update will append the unsharded gradients before clipping."""
    gradients, update = [], engine.step

    def record_and_step():
        if engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            gradients.append({name: safe_get_full_grad(parameter).clone() for name, parameter in named})
        update()

    engine.step = record_and_step
    return gradients


def state_of(engine) -> dict[str, Any]:
    """Return the state as DeepSpeed reads it: masters and moments by name, groups, and Adam's update counts."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed creates this state only in the first step
    named = list(engine.module.named_parameters())
    state: dict[str, Any] = {"master": {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named}}
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = {name: safe_get_full_optimizer_state(p, kind).clone() for name, p in named}
    inner = engine.optimizer.optimizer
    state["groups"] = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in inner.param_groups]
    state["updates"] = [float(adam["step"]) for adam in inner.state.values()]
    return state


def hold_writes() -> threading.Event:
    """Make each snapshot wait before it writes its files. Return the event that ends the wait."""
    write, released = Snapshot.write, threading.Event()

    def wait_and_write(self, folder: Path, rank: int):
        assert released.wait(timeout=WAIT_S)
        return write(self, folder, rank)

    setattr(Snapshot, "write", wait_and_write)  # noqa: B010 (mypy refuses the assignment)
    return released


def write_last(context: CheckpointContext) -> None:
    """Make this rank wait with its writes until the other ranks have used part of the space for the checkpoint."""
    write, deadline = context.snapshot.write, time.monotonic() + WAIT_S

    def wait_and_write(folder: Path, rank: int):
        while shutil.disk_usage(context.folder).free >= context.total_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(folder, rank)

    setattr(context.snapshot, "write", wait_and_write)  # noqa: B010 (mypy refuses the assignment)


def make_loss_infinite(infinite: bool) -> None:
    """Make later text losses infinite but their gradients finite if `infinite`, else restore the normal losses."""

    def infinite_losses(engine, towers, recipe, batch):
        text, align = row_losses(engine, towers, recipe, batch)
        return text + torch.where(batch.real, math.inf, 0.0), align

    step.row_losses = infinite_losses if infinite else row_losses


def fill_disk(file: Path, *, but_for: int) -> None:
    """Create a file that takes all free disk space except `but_for` bytes."""
    with file.open("wb") as output:
        os.posix_fallocate(output.fileno(), 0, shutil.disk_usage(file.parent).free - but_for)


if __name__ == "__main__":
    main()
