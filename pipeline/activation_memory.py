"""Activation memory: recompute only as many layers in the backward pass as a memory budget requires."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from model.errors import UserError
from model.vision import Towers
from pipeline.data.batch import MicroBatch
from pipeline.engine import Engine
from pipeline.flops import GIB
from pipeline.recipe import Recipe
from pipeline.step import row_losses
from pipeline.zero import discard_gradients, missing_moment_bytes

SAMPLE_LAYERS = 4  # layers kept in the second measurement; its difference from the first gives the size of one layer
WARM_UP_PASSES = 2  # ZeRO-3 needs them to re-trace its prefetch order


def fit_kept_layers(engine: Engine, towers: Towers, recipe: Recipe, heaviest: MicroBatch, budget_gib: float) -> str:
    """Keep the activations of as many final layers as fit into the budget. Return a line for the log.

    The peak is measured by forward and backward passes that leave the state unchanged. On a GPU the budget covers all
    allocated memory; on the CPU it covers only the tensors saved for the backward pass. Must be called on every rank.

    Args:
        heaviest: the largest micro-batch that this rank will process.

    Raises: UserError on all ranks if the budget is too small even with every layer recomputed.
    """
    llm = engine.module.llm
    moments = missing_moment_bytes(engine) if engine.device.type == "cuda" else 0

    def peak_gib(kept: int) -> float:
        llm.keep_layers = kept
        used = measure(engine.device, lambda: _run_pass(engine, towers, recipe, heaviest))
        return _max_over_ranks((used + moments) / GIB, engine.device)

    num_layers = recipe.config.llm.num_layers
    least, sample = peak_gib(0), min(SAMPLE_LAYERS, num_layers)
    if least > budget_gib:
        raise UserError(
            f"engine.memory_gib: {budget_gib:g} GiB, but the longest batch takes {least:.3g} GiB with every layer "
            f"recomputed; lower optim.micro_batch (now {recipe.optim.micro_batch}), which does not change the result"
        )
    per_layer = max((peak_gib(sample) - least) / sample, 1e-9)
    kept, peak = min(num_layers, int((budget_gib - least) / per_layer)), least
    while kept and (peak := peak_gib(kept)) > budget_gib:
        kept -= 1
    llm.keep_layers = kept
    first_kept = num_layers - kept
    recomputed = f"layers 0 to {first_kept - 1} are recomputed" if first_kept else "no layer is recomputed"
    keeps = f"{kept} keep {1024 * per_layer:.3g} MiB each" if kept else "none keeps its activations"
    return f"activations: {recomputed}, {keeps}; peak {peak if kept else least:.3g} of {budget_gib:g} GiB"


def measure(device: torch.device, run: Callable[[], None]) -> int:
    """Return the bytes that `run` needs: on a GPU the allocated peak, on the CPU the tensors saved for backward."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP_PASSES + 1):
            run()
        return torch.cuda.max_memory_allocated(device)
    saved_bytes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        run()
    return sum(saved_bytes.values())


def _run_pass(engine: Engine, towers: Towers, recipe: Recipe, batch: MicroBatch) -> None:
    """Run forward and backward as in training, with a zero-weighted loss, so that every gradient is zero."""
    text, align = row_losses(engine, towers, recipe, batch.to(engine.device))
    engine.backward(0.0 * (text.sum() + align.sum()))
    discard_gradients(engine)


def _max_over_ranks(value: float, device: torch.device) -> float:
    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.item()
