"""Metrics of real runs: documented keys, validation losses, console lines, and wandb."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from wandb.proto.wandb_internal_pb2 import Record

from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.metrics.logger import MetricsLogger, append_event
from pipeline.metrics.timers import StartupTimer
from pipeline.recipe import load_recipe
from pipeline.step import Requests, StepReport, Timings
from tests.support.launch import REPOSITORY, finish, fork_python, fork_ranks, run_python

STEPS = 6
MAX_CONSOLE_LINE = 200  # characters


def train_command(recipe_file, shards, run, *overrides):
    return ["-m", "pipeline.train", recipe_file, f"data.shards={shards}", f"run.dir={run}", *overrides]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(recipe_file, shards, tmp_path_factory):
    """Train on two ranks with validation. Return the run folder and the console output."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    heldout = [f"evaluate.shards={shards}", "evaluate.every_steps=4", "evaluate.samples=999"]
    return run, finish(fork_ranks(2, train_command(recipe_file, shards, run, f"steps={STEPS}", *heldout)))


def test_a_validation_with_more_samples_than_exist_uses_each_sample_once(evaluated):
    first, last = [line for line in lines(evaluated[0]) if line.get("event") == "heldout"]
    assert (first["step"], last["step"]) == (4, STEPS)
    assert (first["heldout/samples"], last["heldout/samples"]) == (35, 35)
    assert last["heldout/loss/text"] < first["heldout/loss/text"] < 7
    assert last["heldout/loss/text/squares"] == pytest.approx(last["heldout/loss/text"])


def test_drawing_held_out_images_changes_no_loss_and_adds_the_images_to_wandb(evaluated, recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    draw = [f"evaluate.shards={shards}", "evaluate.every_steps=4", "evaluate.samples=8", "evaluate.draw_every_steps=2"]
    finish(fork_ranks(2, train_command(recipe_file, shards, run, f"steps={STEPS}", *draw, "log.wandb=offline")))
    drawn = [line for line in lines(run) if line.get("event") == "images"]
    assert [(line["step"], line["path"]) for line in drawn] == [(n, f"images/step-{n:08d}.png") for n in (2, 4, 6)]
    assert sorted(path.name for path in (run / "images").iterdir()) == [f"step-{n:08d}.png" for n in (2, 4, 6)]
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/heldout/images_*.png"))) == 3
    keys = ("loss/total", "loss/text", "loss/align", "optim/grad_norm")
    with_drawings, without = (
        [[line[key] for key in keys] for line in lines(folder) if "event" not in line] for folder in (run, evaluated[0])
    )
    assert with_drawings == without


def documented(heading):
    """Return the keys in the first column of the table under a heading of docs/metrics.md."""
    text = (REPOSITORY / "docs/metrics.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_the_keys_of_step_lines_are_exactly_the_documented_keys(evaluated):
    written = [line for line in lines(evaluated[0]) if "event" not in line]
    keys = [{key.replace("squares", "<source>") for key in line} for line in written]
    assert all(each == keys[0] for each in keys)
    assert keys[0] == documented("Keys of a step's line")
    events = {line["event"] for line in lines(evaluated[0]) if "event" in line}
    assert {"start", "save", "heldout", "done"} <= events <= documented("Events")


def test_the_slowest_rank_is_reported_after_every_step_with_images(evaluated):
    by_step = {line["step"]: line for line in lines(evaluated[0]) if "event" not in line}
    had_images = [by_step[step]["loss/align"] is not None for step in range(1, STEPS)]
    assert any(had_images)
    # The times of a step are logged in the line of the next step.
    for step, had in zip(range(2, STEPS + 1), had_images, strict=True):
        ratio = by_step[step]["ranks/slowest_ratio"]
        assert ratio >= 1 if had else ratio is None, f"step {step}"


@pytest.mark.parametrize("why", ["stop", "save", "nonfinite"])
def test_a_stop_a_save_or_a_nonfinite_loss_causes_a_log_line_between_intervals(recipe_file, shards, tmp_path, why):
    recipe = load_recipe(recipe_file, [f"data.shards={shards}", f"run.dir={tmp_path}", "log.every_steps=4"])
    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    data = TrainData(recipe, ranks)
    with MetricsLogger(recipe, ranks, data) as metrics:
        metrics.log_start(0, StartupTimer(), [])
        batches = list(itertools.islice(data.from_step(0), 3))
        for step, batch in enumerate(batches, 1):
            asked = why if step == 3 else ""
            loss = math.nan if asked == "nonfinite" else 1.0
            report = StepReport(
                text=loss,
                align=None,
                total=loss,
                grad_norm=1.0,
                text_by_source=np.ones(1),
                requests=Requests(stop=asked == "stop", save=asked == "save"),
                timings=[Timings()],
            )
            metrics.log_step(step, batch, report, lr=1e-3)
    [line] = [line for line in lines(tmp_path) if "event" not in line]
    assert line["step"] == 3
    assert line["data/samples/squares"] == sum(batch.samples for batch in batches)


def test_an_event_appended_after_a_truncated_line_starts_a_new_line(tmp_path):
    append_event(tmp_path, "first", 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"cut off')
    append_event(tmp_path, "second", 2)
    append_event(tmp_path, "third", 3)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert text[1] == '{"cut off'
    assert [json.loads(line)["event"] for line in (text[0], *text[2:])] == ["first", "second", "third"]


def test_the_console_shows_one_short_line_per_log_interval(evaluated):
    step_lines = [line for line in evaluated[1].splitlines() if line.startswith("step ")]
    assert len(step_lines) == STEPS
    assert all(len(line) < MAX_CONSOLE_LINE for line in step_lines)


def test_wandb_files_contain_every_step_after_a_kill_and_a_resume(recipe_file, shards, tmp_path):
    run, steps = tmp_path / "run", 16
    command = train_command(recipe_file, shards, run, "log.wandb=offline", f"steps={steps}")
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    until = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < 4:
        assert time.monotonic() < until
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    assert any("wandb-core" in member.name() for member in family[:-1])
    for member in family:  # a preemption also signals all processes
        member.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", "by SIGTERM")
    identity = (run / "wandb_id").read_text()

    done = fork_python(*command)
    assert done.returncode == 0, done.stderr
    assert "continues without it" not in done.stdout
    files = list(run.glob(f"wandb/offline-run-*-{identity}/*.wandb"))
    assert len(list(run.glob("wandb/offline-run-*"))) == len(files)
    assert {step for file in files for step in logged_steps(file.read_bytes())} == set(range(1, steps + 1))


SILENT_WANDB = """
import atexit, time
from pathlib import Path

def init(**settings):
    atexit.register(time.sleep, 900)
    return Run()

def Settings(**_):
    return None

class Run:
    def log(self, values, step):
        pass

    def finish(self, exit_code):
        outcome = Path("{run}/outcome.json")
        print("the outcome is written" if outcome.exists() else "too early", flush=True)
        time.sleep(900)
"""
IMPATIENT = (
    "from pipeline import train; from pipeline.metrics import wandb_logger; wandb_logger.FINISH_S = 1; train.main()"
)


def test_a_hanging_wandb_upload_delays_the_exit_only_for_a_limited_time(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "wandb.py").write_text(SILENT_WANDB.format(run=run))
    _, _, *recipe = train_command(recipe_file, shards, run, "log.wandb=online", "steps=2")
    done = run_python("-c", IMPATIENT, *recipe, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the outcome is written" in done.stdout
    assert (
        f"wandb: the upload did not finish within 1 s; run `wandb sync {run}/wandb/run-*` to upload the rest"
        in done.stdout
    )


def logged_steps(data):
    """Yield the steps in a .wandb file. Its format is LevelDB's log format: blocks of 32 KiB after a 7-byte header."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of a record
            items = Record.FromString(record).history.item
            yield from (int(item.value_json) for item in items if "_step" in (item.key, *item.nested_key))
            record = b""
