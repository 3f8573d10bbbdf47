"""Running the cases of a call: open each model once, measure its cases, and keep the rows."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from model.presets import PRESETS
from pipeline.latency.contender import Contender
from pipeline.latency.mamba_ssm_loop import MambaSsmLoop, mamba_ssm_twin
from pipeline.latency.measure import Case, Effort, measure
from pipeline.latency.own import EngineAnswers, open_model
from pipeline.latency.peers import PEERS, PeerModel, TransformersPeer
from pipeline.latency.report import label
from pipeline.latency.results import Results, Row, environment
from pipeline.latency.timing import copy_bandwidth


def measure_missing(
    cases: Sequence[Case], results: Results, device: torch.device, *, effort: Callable[[Case], Effort], limit: float
) -> None:
    """Measure the cases that `results` does not hold for this card and these packages, and add their rows.

    Args:
        cases: Cases in the order in which they are measured.
        results: File of rows.
        device: Device to measure.
        effort: Function that returns how often a case is repeated.
        limit: Seconds after which no further case is begun; 0: no limit.
    """
    started, here = time.monotonic(), environment(device)
    missing = [case for case in cases if not results.holds(case, here)]
    print(f"{here['card']}: {len(missing)} of {len(cases)} rows to measure", flush=True)
    bandwidth = copy_bandwidth(device) if missing else 0.0
    for _, group in itertools.groupby(missing, key=lambda case: (case.implementation, case.model)):
        make: Callable[[Case], Contender] | None = None
        for case in group:
            if limit and time.monotonic() - started > limit:
                print(f"Stopped after {limit:g} seconds. The same command measures the remaining rows.")
                return
            make = make or _opener(case, device)
            row = measure(case, make, effort(case), device, bandwidth)
            results.add(row, here)
            print(_line(row, time.monotonic() - started), flush=True)
            _free_memory()


def _opener(first: Case, device: torch.device) -> Callable[[Case], Contender]:
    """Return a function that prepares a case of the model of `first`. It opens the model when it is first called."""
    opened = cache(lambda: _open(first, device))
    return lambda case: opened()(case)


def _open(first: Case, device: torch.device) -> Callable[[Case], Contender]:
    _free_memory()
    if first.implementation == "ours":
        own = open_model(first.model, device)
        return lambda case: EngineAnswers(own, batch=case.batch, state=case.state, graph=case.graph)
    if first.implementation == "transformers":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        peer = PeerModel(PEERS[first.model], device, dtype)
        return lambda case: TransformersPeer(peer, batch=case.batch, tokens=case.tokens, graph=case.graph)
    config = PRESETS.get(first.model) or open_model(first.model, torch.device("cpu")).loaded.config
    twin = mamba_ssm_twin(config.llm)
    return lambda case: MambaSsmLoop(
        twin,
        config.llm,
        image_tokens=config.vision.num_patches,
        batch=case.batch,
        tokens=case.tokens,
        graph=case.graph,
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(row: Row, elapsed: float) -> str:
    graph = "graph" if row["graph"] else "no graph"
    head = f"{elapsed:5.0f} s  {label(row)}, {row['batch']} × {row['tokens']} tokens, {row['state']}, {graph}: "
    if "error" in row:
        return f"{head}not measured: {row['error']}"
    return (
        f"{head}{row['tokens_per_s']:.0f} tok/s, first token {row['first_token_ms']:.1f} ms, "
        f"{row['token_ms']:.3f} ms per token ({row['share']:.0%} of the ceiling), {row['repeats']} answers"
    )
