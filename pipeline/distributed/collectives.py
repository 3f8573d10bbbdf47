"""Ranks that succeed or fail together: what one of them cannot do, all of them hear of and stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError, explained

T = TypeVar("T")


def together(ranks: Ranks, *actions: Callable[[], T]) -> list[T]:
    """What the actions return here, if all of them succeed on every rank. Every rank must call it.

    Raises: UserError on all ranks alike, with everything that went wrong on any of them; RetryableError if all of that
    may come right by itself.
    """
    results, problems = [], dict[str, bool]()  # what went wrong: whether people must see to it
    for action in actions:
        try:
            results.append(action())
        except (UserError, RetryableError, OSError) as error:  # noqa: PERF203
            told = explained(error) if isinstance(error, OSError) else error
            problems[str(told)] = isinstance(told, UserError)
    everywhere: list[dict[str, bool]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(everywhere, problems)
    distinct = {told: mistake for each in everywhere for told, mistake in each.items()}
    if distinct:
        kind = UserError if any(distinct.values()) else RetryableError
        many = f"{len(distinct)} problems:\n  " if len(distinct) > 1 else ""
        raise kind(many + "\n  ".join(distinct))
    return results


def broadcast_from_main(ranks: Ranks, decide: Callable[[], T]) -> T:
    """What `decide` returns on the main rank, or the UserError or RetryableError that it raises there; on all.

    Every rank must call it.
    """
    outcome: list[T | UserError | RetryableError | None] = [None]
    if ranks.is_main:
        try:
            outcome = [decide()]
        except (UserError, RetryableError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], (UserError, RetryableError)):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
