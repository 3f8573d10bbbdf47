"""Run by the tests on several ranks: a few training steps whose whole gradients are kept.

rank_program.py OUT RECIPE [key=value …]: OUT becomes {"gradients": [{name: tensor} per step], "reports": […]}.
"""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from pipeline.checkpoint import Checkpoints
from pipeline.data import TrainData
from pipeline.engine import build_engine, init_distributed, learning_rate
from pipeline.ranks import find_ranks
from pipeline.recipe import load_recipe
from pipeline.run import Run
from pipeline.step import optimizer_step
from pipeline.train import _identity, build_model


def main() -> None:
    out, recipe = Path(sys.argv[1]), load_recipe(sys.argv[2], sys.argv[3:])
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks)
    data = TrainData(recipe, ranks)
    emma, towers, _ = build_model(Run(recipe, ranks), ranks)
    engine = build_engine(emma, recipe, ranks)
    checkpoints = Checkpoints(recipe, ranks, _identity(recipe, data, engine))
    first, _ = checkpoints.resume(engine)
    gradients = keep_gradients(engine)
    reports = []
    for batch in data.from_step(first):
        lr = learning_rate(recipe, batch.step, data.total_steps)
        report = optimizer_step(engine, towers, recipe, batch, lr)
        reports.append(vars(report))
        if checkpoints.due(batch.step + 1):
            checkpoints.save(engine, batch.step + 1)
    if ranks.is_main:
        torch.save({"gradients": gradients, "reports": reports, "first": first}, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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


if __name__ == "__main__":
    main()
