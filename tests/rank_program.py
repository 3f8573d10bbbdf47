"""Run by the tests on several ranks: a few training steps whose whole gradients, or states, are kept.

rank_program.py OUT RECIPE [key=value …] [until=N] [keep=states] [disk=slow] [fill=FILE] [spoil=N]

OUT becomes {"gradients": [{name: tensor} per step], "reports": […], "first": step}; with keep=states also "states":
{step: what DeepSpeed says of every parameter}, right after resuming and at each save. `until` ends it early; on a slow
disk writing takes longer than some steps; `fill` grows after the first save, until there is no room for another.
`spoil`: a step (0-based) in which the main rank's losses are infinite, its gradients finite.
"""

import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

from pipeline import snapshot, step
from pipeline.checkpoint import Checkpoints
from pipeline.data import TrainData
from pipeline.engine import build_engine, init_distributed, learning_rate
from pipeline.probe import Probe
from pipeline.ranks import find_ranks
from pipeline.recipe import load_recipe
from pipeline.run import Run
from pipeline.train import _identity, build_model

row_losses = step.row_losses
OURS = {"until": str(2**31), "keep": "gradients", "disk": "fast", "fill": "", "spoil": "-1"}


def main() -> None:
    words = [word.split("=", 1) for word in sys.argv[3:]]
    ours = OURS | {key: value for key, value in words if key in OURS}
    recipe = load_recipe(sys.argv[2], [f"{key}={value}" for key, value in words if key not in OURS])
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks)
    data = TrainData(recipe, ranks)
    emma, towers, _ = build_model(Run(recipe, ranks), ranks)
    engine = build_engine(emma, recipe, ranks)
    probe = Probe(engine, towers, recipe, ranks, data)
    checkpoints = Checkpoints(recipe, ranks, _identity(recipe, data), engine, probe)
    first, notes = checkpoints.resume()
    if ours["disk"] == "slow":
        slow_down_the_disk()
    states = {first: full_state_of(engine)} if ours["keep"] == "states" and first else {}
    gradients = keep_gradients(engine) if ours["keep"] == "gradients" else []
    reports = []
    for batch in data.from_step(first):
        lr = learning_rate(recipe, batch.step, data.total_steps)
        spoil_the_loss(batch.step == int(ours["spoil"]) and ranks.is_main)
        report = step.optimizer_step(engine, towers, recipe, batch, lr)
        reports.append(vars(report) | {"writing_here": checkpoints.writing, "learning_rates": learning_rates(engine)})
        if checkpoints.due(batch.step + 1):
            checkpoints.save(batch.step + 1)
            if ours["keep"] == "states":
                states[batch.step + 1] = full_state_of(engine)
            if ours["fill"]:
                checkpoints.finish()
                fill_the_disk(Path(ours["fill"]), but_for=checkpoints.snapshot.bytes)
        if batch.step + 1 == int(ours["until"]):
            break
    checkpoints.finish()
    if ranks.is_main:
        kept = {"gradients": gradients, "reports": reports, "first": first, "states": states, "notes": notes}
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


def slow_down_the_disk():
    write = snapshot._write

    def slow(path: Path, tensor):
        time.sleep(1.5)
        return write(path, tensor)

    snapshot._write = slow


def spoil_the_loss(now: bool):
    def spoilt(engine, towers, recipe, batch):
        text, align = row_losses(engine, towers, recipe, batch)
        return text + torch.where(batch.real, math.inf, 0.0), align

    step.row_losses = spoilt if now else row_losses


def fill_the_disk(file: Path, but_for: int):
    with file.open("ab") as other:
        if not other.tell():
            os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(file.parent).free - but_for)


if __name__ == "__main__":
    main()
