"""Ranks that succeed or fail together: what one of them cannot do, all of them hear of and stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from model.errors import UserError
from pipeline.ranks import Ranks
from pipeline.shard_reader import LostDataError

T = TypeVar("T")


def together(ranks: Ranks, *actions: Callable[[], T]) -> list[T]:
    """What the actions return here, if all of them succeed on every rank. Every rank must call it.

    Raises: UserError on all ranks alike, with everything that went wrong on any of them.
    """
    results, problems = [], []
    for action in actions:
        try:
            results.append(action())
        except UserError as error:  # noqa: PERF203
            problems.append(str(error))
    everywhere: list[list[str]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(everywhere, problems)
    distinct = list(dict.fromkeys(problem for each in everywhere for problem in each))
    if len(distinct) == 1:
        raise UserError(distinct[0])
    if distinct:
        raise UserError(f"{len(distinct)} problems:\n  " + "\n  ".join(distinct))
    return results


def on_main(ranks: Ranks, decide: Callable[[], T]) -> T:
    """What `decide` returns on the main rank, or the UserError or LostDataError that it raises there; on all.

    Every rank must call it.
    """
    outcome: list[T | UserError | LostDataError | None] = [None]
    if ranks.is_main:
        try:
            outcome = [decide()]
        except (UserError, LostDataError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], (UserError, LostDataError)):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
