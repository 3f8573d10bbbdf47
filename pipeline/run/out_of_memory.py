"""Too little memory: a mistake in the recipe, or, where steps of just this kind have had room, a node in other use."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError, first_line
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError
from pipeline.metrics.history import has_stepped_with
from pipeline.recipe import Recipe


def memory_settings(recipe: Recipe) -> dict[str, Any]:
    """What the memory of a rank depends on, beside the number of ranks, and may change from start to start."""
    return {"micro_batch": recipe.optim.micro_batch, "workers": recipe.data.workers, **asdict(recipe.engine)}


def out_of_memory_error(recipe: Recipe, ranks: Ranks, told: str, remedy: str) -> UserError | RetryableError:
    """What to raise: to be tried again, elsewhere perhaps, if this run has done a step with these very settings."""
    if has_stepped_with(Path(recipe.run.dir), world_size=ranks.world_size, settings=memory_settings(recipe)):
        return RetryableError(f"{told}; steps of this run have had room: does something else use this node?")
    return UserError(f"{told}; {remedy}")


@contextmanager
def explain_out_of_memory(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """In place of CUDA's error, what to do about it. Raises: what `out_of_memory_error` makes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = (
            f"lower optim.micro_batch (now {recipe.optim.micro_batch}), which changes nothing else, or "
            "engine.keep_layers or engine.memory_gib, if they are set"
        )
        told = f"rank {ranks.rank} on {socket.gethostname()}: {first_line(error)}"
        raise out_of_memory_error(recipe, ranks, told, remedy) from None
