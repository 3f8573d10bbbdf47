"""Collectives that raise the same error on all ranks, so that no rank waits for one that has already failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError, from_oserror

T = TypeVar("T")


def collectively(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run an action on every rank. Return this rank's result, or raise the combined error on all ranks.

    Must be called on every rank.

    Raises:
        UserError: if any rank failed with an error that the user can fix. The message lists the errors of all ranks.
        RetryableError: if ranks failed, but all of them with transient errors.
    """
    [result] = run_checks(ranks, [action])
    return result


def run_checks(ranks: Ranks, checks: Sequence[Callable[[], T]]) -> list[T]:
    """Run all checks of this rank. Return their results, or raise the errors of all ranks combined on every rank.

    A failed check does not stop the checks after it. Must be called on every rank, but ranks may pass different checks.

    Raises: the errors that `collectively` raises.
    """
    results: list[T] = []
    errors: dict[str, bool] = {}  # by message: whether it is a UserError
    for check in checks:
        try:
            results.append(check())
        except (UserError, RetryableError, OSError) as error:  # noqa: PERF203
            known = from_oserror(error) if isinstance(error, OSError) else error
            errors[str(known)] = isinstance(known, UserError)
    errors_by_rank: list[dict[str, bool]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(errors_by_rank, errors)
    distinct = {message: is_users for rank_errors in errors_by_rank for message, is_users in rank_errors.items()}
    if distinct:
        kind = UserError if any(distinct.values()) else RetryableError
        heading = f"{len(distinct)} problems:\n  " if len(distinct) > 1 else ""
        raise kind(heading + "\n  ".join(distinct))
    return results


def broadcast_from_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run an action on the main rank, and return its result on every rank. Must be called on every rank.

    Raises on all ranks: the UserError or RetryableError that the action raised on the main rank.
    """
    outcome: list[T | UserError | RetryableError | None] = [None]
    if ranks.is_main:
        try:
            outcome = [action()]
        except (UserError, RetryableError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], (UserError, RetryableError)):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
