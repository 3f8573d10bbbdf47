"""Runs of the ablation: each is a file, can be interrupted and continued, and several train at once on one GPU."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation import data
from benchmarks.ablation.configs import SEARCH_SEED, SIZES, Run
from benchmarks.ablation.measure import Trained, measure_answers, measure_probes, measure_reconstruction
from benchmarks.ablation.report import accuracy
from benchmarks.ablation.towers import ensure_towers, load_towers
from benchmarks.ablation.train import Batches, start, train
from model.errors import UserError, first_line
from model.vision import Towers
from model.weights import save_model
from preprocess.atomic import write_json

MEASURE_S = 30.0  # time that is left for the measurements when the time of a call is up


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Folder of an ablation: `data/` and `towers.safetensors`, which every run shares, and a file for each run.

    runs/KEY.json       settings, attempts and results of a run, from its start
    partial/KEY.pt      an interrupted training
    models/VARIANT      trained model of test seed 0, as `pipeline.visualize` reads it
    """

    folder: Path
    size: str

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def prepare(self, processes: int) -> dict[str, str]:
        """Build the data and train the towers, unless they are there. Return the hashes of both."""
        size = SIZES[self.size]
        hashes = {"data": data.build(self.data, size, processes)}
        hashes["towers"] = ensure_towers(self.folder, size, data.load(self.data, "towers"), _device())
        return hashes

    def file(self, key: str) -> Path:
        return self.folder / "runs" / f"{key}.json"

    def partial(self, key: str) -> Path:
        return self.folder / "partial" / f"{key}.pt"

    def results(self) -> tuple[list[dict[str, Any]], int]:
        """Return the files of all runs of this size, and the number of other files.

        Other files are of another size, or were written before the sizes or the program changed.
        """
        paths = sorted((self.folder / "runs").glob("*.json"))
        records = {path.stem: json.loads(path.read_text()) for path in paths}
        ours = [record for key, record in records.items() if Run(**record["run"]).key(record["inputs"]) == key]
        ours = [record for record in ours if record["run"]["size"] == self.size]
        if len({json.dumps(record["inputs"], sort_keys=True) for record in ours}) > 1:
            raise UserError(f"{self.folder}/runs: the runs have different data or towers. Move some of them away.")
        return ours, len(records) - len(ours)


def execute(workspace: Workspace, runs: Sequence[Run], *, processes: int, seconds: float) -> dict[str, int]:
    """Start or continue runs, `processes` at once, until all are done or the time is up.

    Returns: number of runs by outcome. "waiting" are those for which no time was left.
    """
    until = time.time() + seconds
    inputs = workspace.prepare(default_processes())
    for name in ("runs", "partial", "models"):
        (workspace.folder / name).mkdir(exist_ok=True)
    attempts = [(workspace, run, inputs, until) for run in runs]
    if processes == 1:
        outcomes = [_attempt(*attempt) for attempt in attempts]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(_attempt, *zip(*attempts, strict=True)))
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def default_processes() -> int:
    return len(os.sched_getaffinity(0))


def _attempt(workspace: Workspace, run: Run, inputs: dict[str, str], until: float) -> str:
    """Start or continue one run, and record the attempt in its file before and after. Return the outcome."""
    file = workspace.file(key := run.key(inputs))
    record: dict[str, Any] = {"run": asdict(run), "inputs": inputs, "outcome": "started"}
    if file.exists():
        record = json.loads(file.read_text())
    record.setdefault("attempts", [])
    if record["outcome"] == "done":
        return "done"
    if time.time() > until - MEASURE_S:
        return "waiting"
    record["attempts"].append({"began": time.time(), "device": _device_name()})
    write_json(file, record)
    try:
        results = _train_and_measure(workspace, run, key, until)
        record |= {"outcome": "done", **results} if results else {"outcome": "interrupted"}
    except Exception as error:  # a run that fails must not end the others, and is reported
        traceback.print_exc()
        record["outcome"] = "failed"
        record["attempts"][-1]["error"] = first_line(error)
    record["attempts"][-1]["ended"] = time.time()
    write_json(file, record)
    score = f", validation accuracy {accuracy(record['val']):.3f}, {record['seconds']} s" if "val" in record else ""
    print(f"{run.name}: {record['outcome']}{score}", flush=True)
    return record["outcome"]


def _train_and_measure(workspace: Workspace, run: Run, key: str, until: float) -> dict[str, Any] | None:
    """Return the results of a run, or None if its time was up before its last step."""
    size, partial = SIZES[run.size], workspace.partial(key)
    towers, batches = _inputs(workspace)
    progress = start(run, _device())
    if partial.exists():
        progress.restore(partial)
    if not train(progress, run, towers, batches, until=until - MEASURE_S, save_to=partial):
        return None
    model = Trained(emma=progress.emma, towers=towers, tokenizer=workspace.data / "tokenizer", device=_device())
    began, val = time.monotonic(), data.load(workspace.data, "val")
    results: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in progress.emma.parameters()),
        "curve": progress.curve,
        "seconds": round(progress.seconds, 1),
        "val": measure_answers(model, val),
    }
    if not run.is_search:
        test = data.load(workspace.data, "test")
        results["test"] = measure_answers(model, test)
        results["reconstruction"] = measure_reconstruction(model, test)
        results["probes"] = measure_probes(model, size, val, test)
        if run.seed == 0:
            _save(workspace, model, run)
    results["measure_s"] = round(time.monotonic() - began, 1)
    partial.unlink(missing_ok=True)
    return results


def calibrate(workspace: Workspace, variants: Sequence[str], *, processes: int, seconds: float) -> None:
    """Print the steps per second of `processes` equal trainings at once, and the time to answer the questions."""
    workspace.prepare(default_processes())
    print(f"{'variant':<8} {'steps/s each':>12} {'s per run':>10} {'peak GiB each':>13} {'val answers s':>13}")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for variant in variants:
            timings = list(pool.map(_time_run, *zip(*[(workspace, variant, seconds)] * processes, strict=True)))
            rate, peak_gib, answers_s = (sum(column) / processes for column in zip(*timings, strict=True))
            run_s = SIZES[workspace.size].steps / rate
            print(f"{variant:<8} {rate:>12.1f} {run_s:>10.0f} {peak_gib:>13.2f} {answers_s:>13.1f}", flush=True)


def _time_run(workspace: Workspace, variant: str, seconds: float) -> tuple[float, float, float]:
    """Train for `seconds` to warm up, and again to measure. Return steps per second, peak GiB, seconds to answer."""
    towers, batches = _inputs(workspace)
    run = Run(size=workspace.size, variant=variant, seed=SEARCH_SEED, lr=1e-3, align_factor=1.0)
    progress = start(run, _device())
    train(progress, run, towers, batches, until=time.time() + seconds, save_to=None)
    progress.step, progress.seconds = 0, 0.0
    train(progress, run, towers, batches, until=time.time() + seconds, save_to=None)
    model = Trained(emma=progress.emma, towers=towers, tokenizer=workspace.data / "tokenizer", device=_device())
    began = time.monotonic()
    measure_answers(model, data.load(workspace.data, "val"))
    answers_s = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return progress.step / progress.seconds, peak, answers_s


@cache
def _inputs(workspace: Workspace) -> tuple[Towers, Batches]:
    """Load the towers and the training data onto the device, once per process."""
    size, device = SIZES[workspace.size], _device()
    return load_towers(workspace.folder, size, device), Batches(size, data.load(workspace.data, "train"), device)


def _save(workspace: Workspace, model: Trained, run: Run) -> None:
    folder = workspace.folder / "models" / run.variant
    folder.mkdir(exist_ok=True)
    save_model(
        folder,
        config=model.emma.config,
        state=model.emma.state_dict(),
        towers=model.towers,
        tokenizer_json=(model.tokenizer / "tokenizer.json").read_text(encoding="utf-8"),
        extra={"ablation": asdict(run)},
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
