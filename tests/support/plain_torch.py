"""Reference training without DeepSpeed: one process, AdamW, and the whole global batch in one forward pass."""

from typing import NamedTuple

import torch

from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.initial_model import initial_model
from pipeline.lr_schedule import learning_rate
from pipeline.optimizer import parameter_groups
from pipeline.recipe import Recipe
from pipeline.step import row_losses, step_totals


class Step(NamedTuple):
    gradients: dict[str, torch.Tensor]  # before clipping
    loss: float
    modality: str


def train_plainly(recipe: Recipe, device: str = "cpu") -> list[Step]:
    """Train without DeepSpeed. The recipe's global batch must be a single micro-batch. Return all steps."""
    data = TrainData(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    emma, towers, _ = initial_model(recipe)
    emma.to(device)
    towers.to(device, torch.bfloat16 if device == "cuda" else torch.float32)  # the dtypes that pipeline.train uses
    optimizer = torch.optim.AdamW(parameter_groups(emma, recipe.optim.weight_decay), recipe.optim.lr)
    steps = []
    for batch in data.from_step(0):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, batch.step, data.total_steps)
        [micro_batch] = batch.micro_batches
        totals = step_totals(recipe, batch)
        text, align = row_losses(emma, towers, recipe, micro_batch.to(torch.device(device)))
        loss = text.sum() / totals.text + recipe.align_weight * align.sum() / totals.images
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        gradients = {name: _gradient(p) for name, p in emma.named_parameters()}
        steps.append(Step(gradients, loss.item(), "image" if batch.images else "text"))
        torch.nn.utils.clip_grad_norm_(emma.parameters(), recipe.optim.clip)
        optimizer.step()
    return steps


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).cpu().clone()
