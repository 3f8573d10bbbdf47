"""`run_checks`: errors of any rank are raised on all ranks, combined into one error."""

import errno
import os

import pytest
import torch

from model.errors import UserError
from pipeline.distributed.collectives import run_checks
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError

TWO = Ranks(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))


def failing(error):
    def fail():
        raise error

    return fail


def os_error(code, path="/data/index.parquet"):
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize(
    ("errors", "other_rank", "kind", "expected"),
    [
        ([UserError("a mistake")], {}, UserError, ["a mistake"]),
        ([RetryableError("a bad disk")], {}, RetryableError, ["a bad disk"]),
        (
            [RetryableError("a bad disk"), UserError("a mistake")],
            {},
            UserError,
            ["2 problems", "a bad disk", "a mistake"],
        ),
        ([], {"a mistake there": True}, UserError, ["a mistake there"]),
        ([RetryableError("a bad disk")], {"a mistake there": True}, UserError, ["a bad disk", "a mistake there"]),
        ([], {"a bad disk there": False}, RetryableError, ["a bad disk there"]),
        (
            [os_error(errno.EACCES)],
            {},
            UserError,
            ["/data/index.parquet: Permission denied; ask its owner for permission"],
        ),
        ([os_error(errno.EIO)], {}, RetryableError, ["/data/index.parquet: Input/output error, on "]),
        ([OSError(errno.EIO, "Input/output error")], {}, RetryableError, ["Input/output error, on "]),
    ],
)
def test_errors_of_several_ranks_are_combined_and_retryable_only_if_all_are(
    monkeypatch, errors, other_rank, kind, expected
):
    def gather(errors_by_rank, mine):
        errors_by_rank[:] = [mine, other_rank]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(kind) as raised:
        run_checks(TWO, [lambda: 1, *map(failing, errors)])
    assert type(raised.value) is kind
    assert not str(raised.value).startswith(":")
    for text in expected:
        assert text in str(raised.value)
