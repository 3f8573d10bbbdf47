"""Out-of-memory errors: user errors, unless earlier steps with the same settings fitted into memory."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from model.errors import UserError, first_line
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError
from pipeline.metrics.history import has_stepped_with
from pipeline.recipe import Recipe


def out_of_memory_error(recipe: Recipe, ranks: Ranks, problem: str, remedy: str) -> UserError | RetryableError:
    """Return the error to raise when memory runs out.

    It is a RetryableError if this run has done a step with the same settings, because then another process probably
    uses the node. Otherwise it is a UserError, because the recipe needs too much memory.
    """
    if has_stepped_with(Path(recipe.run.dir), world_size=ranks.world_size, settings=recipe.memory_settings()):
        return RetryableError(
            f"{problem}; earlier steps of this run with the same settings fitted: does another process use this node?"
        )
    return UserError(f"{problem}; {remedy}")


@contextmanager
def explain_out_of_memory(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """Convert CUDA's out-of-memory error inside the block with `out_of_memory_error`, and raise the result."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = (
            f"lower optim.micro_batch (now {recipe.optim.micro_batch}), which does not change the training, or "
            "engine.keep_layers or engine.memory_gib, if they are set"
        )
        problem = f"rank {ranks.rank} on {socket.gethostname()}: {first_line(error)}"
        raise out_of_memory_error(recipe, ranks, problem, remedy) from None
