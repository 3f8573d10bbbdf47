"""Run by the tests on several ranks: a few training steps whose whole gradients, or states, are kept.

rank_program.py OUT RECIPE [key=value …] [until=N] [keep=states] [disk=slow] [fill=FILE] [spoil=N]

OUT becomes {"gradients": [{name: tensor} per step], "reports": […], "first": step}; with keep=states also "states":
{step: what DeepSpeed says of every parameter}, right after resuming and at each save; "untrained": the updates that a
snapshot before the first step has counted. `until` ends it early; on a slow
disk nothing is written before that; `fill` leaves room for one checkpoint, of which the main rank writes its part last.
`spoil`: a step (0-based) in which the main rank's losses are infinite, its gradients finite.
"""

import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

from pipeline import step
from pipeline.checkpoint.context import CheckpointContext
from pipeline.checkpoint.folder import list_steps
from pipeline.checkpoint.probe import Probe
from pipeline.checkpoint.resumer import Resumer
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import find_ranks
from pipeline.engine import build_engine, init_distributed
from pipeline.lr_schedule import learning_rate
from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder
from pipeline.train import build_model, training_identity

row_losses = step.row_losses
HELD_S = 60.0  # at most
SLACK_BYTES = 1 << 20  # less than a rank's share
OURS = {"until": str(2**31), "keep": "gradients", "disk": "fast", "fill": "", "spoil": "-1"}


def main() -> None:
    words = [word.split("=", 1) for word in sys.argv[3:]]
    ours = OURS | {key: value for key, value in words if key in OURS}
    recipe = load_recipe(sys.argv[2], [f"{key}={value}" for key, value in words if key not in OURS])
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks)
    data = TrainData(recipe, ranks)
    run = RunFolder(recipe, ranks)
    saved_steps = list_steps(run.folder / "checkpoints")
    emma, towers, _ = build_model(run, ranks, resume=bool(saved_steps))
    engine = build_engine(emma, recipe, ranks)
    probe = Probe(engine, towers, recipe, ranks, data)
    identity = training_identity(recipe, data)
    context = CheckpointContext(recipe=recipe, ranks=ranks, identity=identity, engine=engine, probe=probe)
    first, notes = Resumer(context).resume(saved_steps)
    saver = Saver(context, resumed_from=first)
    disk = hold_up_the_disk() if ours["disk"] == "slow" else None
    untrained = None if first else context.snapshot.take()
    if ours["fill"] and ranks.is_main:
        fill_the_disk(Path(ours["fill"]), but_for=context.total_bytes + SLACK_BYTES)
        write_after_the_others(context)
    states = {first: full_state_of(engine)} if ours["keep"] == "states" and first else {}
    gradients = keep_gradients(engine) if ours["keep"] == "gradients" else []
    reports = []
    for batch in data.from_step(first):
        lr = learning_rate(recipe, batch.step, data.total_steps)
        spoil_the_loss(batch.step == int(ours["spoil"]) and ranks.is_main)
        losses = step.optimizer_step(engine, towers, recipe, batch, lr)
        report = step.reduce_step(losses, step.Requests(), step.Timings())
        reports.append(vars(report) | {"writing_here": saver.writing, "learning_rates": learning_rates(engine)})
        if saver.due(batch.step + 1):
            saver.save(batch.step + 1)
            if ours["keep"] == "states":
                states[batch.step + 1] = full_state_of(engine)
        if batch.step + 1 == int(ours["until"]):
            break
    if disk:
        disk.set()
    saver.finish()
    if ranks.is_main:
        kept = {"gradients": gradients, "reports": reports, "first": first, "states": states, "notes": notes}
        kept["untrained"] = untrained
        torch.save(kept, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def learning_rates(engine):
    return [group["lr"] for group in engine.optimizer.optimizer.param_groups]


def keep_gradients(engine):
    """Collect what the update is about to use, whole, on every rank, before it is clipped."""
    gradients, update = [], engine.step

    def step():
        if engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            gradients.append({name: safe_get_full_grad(parameter).clone() for name, parameter in named})
        update()

    engine.step = step
    return gradients


def full_state_of(engine):
    """As DeepSpeed itself finds it: masters and moments by name; the groups, and the updates that Adam has counted."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # else only after a step
    named = list(engine.module.named_parameters())
    state: dict[str, Any] = {"master": {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named}}
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = {name: safe_get_full_optimizer_state(p, kind).clone() for name, p in named}
    inner = engine.optimizer.optimizer
    state["groups"] = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in inner.param_groups]
    state["updates"] = [float(each["step"]) for each in inner.state.values()]
    return state


def hold_up_the_disk() -> threading.Event:
    """Nothing is written until the event is set."""
    write, free = Snapshot.write, threading.Event()

    def held(self, folder: Path, rank: int):
        assert free.wait(timeout=HELD_S)
        return write(self, folder, rank)

    setattr(Snapshot, "write", held)  # noqa: B010 (the type checker minds the other way)
    return free


def write_after_the_others(context: CheckpointContext):
    """This rank writes when the others have taken some of the room for all."""
    write, until = context.snapshot.write, time.monotonic() + HELD_S

    def late(folder: Path, rank: int):
        while shutil.disk_usage(context.folder).free >= context.total_bytes and time.monotonic() < until:
            time.sleep(0.01)
        return write(folder, rank)

    setattr(context.snapshot, "write", late)  # noqa: B010 (the type checker minds the other way)


def spoil_the_loss(now: bool):
    def spoilt(engine, towers, recipe, batch):
        text, align = row_losses(engine, towers, recipe, batch)
        return text + torch.where(batch.real, math.inf, 0.0), align

    step.row_losses = spoilt if now else row_losses


def fill_the_disk(file: Path, but_for: int):
    with file.open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(file.parent).free - but_for)


if __name__ == "__main__":
    main()
