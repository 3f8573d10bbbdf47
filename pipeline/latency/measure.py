"""Measuring one case: repeated answers, from which times by phase, percentiles per token and rates are computed."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from model.errors import UserError, first_line
from pipeline.latency.contender import ALL_TOKENS, IMAGE, PROMPT, TOKEN, Contender
from pipeline.latency.timing import Marks, synchronize

Implementation = Literal["ours", "transformers", "mamba_ssm"]
MIN_REPEATS, MIN_TOKENS, WARM_UP_TOKENS = 3, 16, 4
WARM_UPS = 2  # the inference engine captures a CUDA graph when a shape comes up for the second time


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one row of the table measures.

    tokens    tokens that are generated for every row of the batch
    state     type of the recurrent states, or of the keys and values of a transformer
    """

    model: str
    implementation: Implementation
    graph: bool
    state: str
    batch: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How often a case is repeated.

    seconds    answers are repeated until this time has passed, and at least MIN_REPEATS times
    repeats    exact number of answers, each with all tokens, whatever their time; 0: `seconds` decides
    """

    seconds: float
    repeats: int = 0


class Times(NamedTuple):
    """Seconds of one answer: image encoders, prefill, and each further token, or all further tokens together."""

    towers: float
    prefill: float
    steps: list[float]


def measure(
    case: Case, make: Callable[[Case], Contender], effort: Effort, device: torch.device, bandwidth: float
) -> dict[str, Any]:
    """Return the row of a case. If the case cannot run, the row says why under "error"."""
    try:
        return asdict(case) | _measure(case, make(case), effort, device, bandwidth)
    except UserError:
        raise
    except Exception as error:  # other packages raise exceptions of many types
        if not isinstance(error, ImportError | torch.OutOfMemoryError):
            traceback.print_exc()
        return asdict(case) | {"error": first_line(error)}


def _measure(
    case: Case, contender: Contender, effort: Effort, device: torch.device, bandwidth: float
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UPS):
        contender.answer(WARM_UP_TOKENS, lambda phase: None)
    warm = _one_answer(contender, WARM_UP_TOKENS, device)
    tokens = case.tokens if effort.repeats else _affordable_tokens(case.tokens, effort.seconds, warm)
    runs: list[Times] = []
    begun = time.perf_counter()
    while len(runs) < (effort.repeats or MIN_REPEATS) or (
        not effort.repeats and time.perf_counter() - begun < effort.seconds
    ):
        runs.append(_one_answer(contender, tokens, device))
    towers, prefill = statistics.mean(run.towers for run in runs), statistics.mean(run.prefill for run in runs)
    steps = [step for run in runs for step in run.steps]
    per_token = sum(steps) / len(runs) / (tokens - 1)
    answer = towers + prefill + (case.tokens - 1) * per_token
    result = {
        "repeats": len(runs),
        "measured_tokens": tokens,
        "prompt_tokens": contender.prompt_tokens,
        "towers_ms": 1000 * towers,
        "prefill_ms": 1000 * prefill,
        "first_token_ms": 1000 * (towers + prefill),
        "token_ms": 1000 * per_token,
        "answer_s": answer,
        "tokens_per_s": case.batch * case.tokens / answer,
        "decode_tokens_per_s": case.batch / per_token,
        "share": contender.bytes_per_step / per_token / bandwidth,
        "bandwidth": bandwidth,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    if len(steps) == len(runs) * (tokens - 1):  # otherwise the implementation does not tell the time of each token
        cuts = statistics.quantiles(steps, n=100, method="inclusive")
        result |= {f"p{percent}_ms": 1000 * cuts[percent - 1] for percent in (50, 90, 99)}
    return result


def _one_answer(contender: Contender, tokens: int, device: torch.device) -> Times:
    synchronize(device)
    marks = Marks(device)
    marks("start")
    contender.answer(tokens, marks)
    times = marks.seconds()
    return Times(
        towers=sum(seconds for phase, seconds in times if phase == IMAGE),
        prefill=sum(seconds for phase, seconds in times if phase == PROMPT),
        steps=[seconds for phase, seconds in times if phase in (TOKEN, ALL_TOKENS)],
    )


def _affordable_tokens(tokens: int, seconds: float, warm: Times) -> int:
    """Return how many tokens to generate per repeat, so that MIN_REPEATS repeats fit into the given seconds.

    A token takes the same time at every position, because states and static caches have a fixed size.
    """
    per_token = sum(warm.steps) / (WARM_UP_TOKENS - 1)
    affordable = int((seconds / MIN_REPEATS - warm.towers - warm.prefill) / per_token)
    return min(tokens, max(affordable, MIN_TOKENS))
