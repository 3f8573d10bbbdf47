"""As few layers recomputed in backward as a memory budget allows, by what a step was measured to take."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from model.errors import UserError
from model.vision import Towers
from pipeline.data.loader import MicroBatch
from pipeline.engine import Engine
from pipeline.flops import GIB
from pipeline.recipe import Recipe
from pipeline.step import row_losses
from pipeline.zero import clear_gradients, missing_moment_bytes

SAMPLE_LAYERS = 4  # kept in the second measurement, which tells what one more layer takes
PASSES = 3  # until ZeRO-3 knows the new order of layers by heart, and gathers the weights of several ahead


def fit_kept_layers(engine: Engine, towers: Towers, recipe: Recipe, heaviest: MicroBatch, budget: float) -> str:
    """Keep the activations of as many last layers as fit into `budget` GiB; a line about it. Every rank must call it.

    Measured on `heaviest`, the largest micro-batch that this rank will see, by forward and backward passes that leave
    nothing behind. On a GPU the budget is for all that is allocated, elsewhere for what is held for backward.
    Raises: UserError on all ranks if it is too small even with every layer recomputed.
    """
    llm, moments = engine.module.llm, missing_moment_bytes(engine) if engine.device.type == "cuda" else 0

    def peak_gib(kept: int) -> float:
        llm.keep_layers = kept
        held = measure(engine.device, lambda: _pass(engine, towers, recipe, heaviest))
        return _largest((held + moments) / GIB, engine.device)

    num_layers = recipe.config.llm.num_layers
    least, sample = peak_gib(0), min(SAMPLE_LAYERS, num_layers)
    if least > budget:
        raise UserError(
            f"engine.memory_gib: {budget:g} GiB, but the longest batch takes {least:.3g} with every layer recomputed; "
            f"lower optim.micro_batch (now {recipe.optim.micro_batch}), which changes nothing else"
        )
    each = max((peak_gib(sample) - least) / sample, 1e-9)
    kept, peak = min(num_layers, int((budget - least) / each)), least
    while kept and (peak := peak_gib(kept)) > budget:
        kept -= 1
    llm.keep_layers = kept
    return _describe(num_layers, kept, each, peak if kept else least, budget)


def _describe(num_layers: int, kept: int, each: float, peak: float, budget: float) -> str:
    first = num_layers - kept
    recomputed = f"layers 0 to {first - 1} are recomputed" if first else "no layer is recomputed"
    keeps = f"{kept} keep {1024 * each:.3g} MiB each" if kept else "none keeps its activations"
    return f"activations: {recomputed}, {keeps}; peak {peak:.3g} of {budget:g} GiB"


def measure(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes: on a GPU the peak of what is allocated when `run` has settled, elsewhere what autograd saves in it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(PASSES):
            run()
        return torch.cuda.max_memory_allocated(device)
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(held.values())


def _pass(engine: Engine, towers: Towers, recipe: Recipe, batch: MicroBatch) -> None:
    """Forward and backward as in training, of a loss that weighs nothing: every gradient is zero."""
    text, align = row_losses(engine, towers, recipe, batch.to(engine.device))
    engine.backward(0.0 * (text.sum() + align.sum()))
    engine.optimizer.zero_grad()
    clear_gradients(engine)


def _largest(value: float, device: torch.device) -> float:
    held = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.item()
