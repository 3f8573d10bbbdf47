"""Stop and save requests on a single rank. test_pipeline_train.py tests stop requests on two ranks."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.checkpoint.folder import list_steps
from pipeline.metrics.history import History, read_history
from pipeline.run.control import Control
from pipeline.status import state_of
from tests.support.launch import REPOSITORY, finish, fork_ranks
from tests.support.slurm import wait_until


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Return the Control of a run folder in which a stop request has not been answered."""
    monkeypatch.delenv("EMMA_JOB", raising=False)
    (tmp_path / "control").mkdir()
    (tmp_path / "control/stop").touch()
    return Control(tmp_path)


def test_an_interactive_launch_in_an_allocation_clears_an_unanswered_stop_request(control, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    control.clear_unanswered()
    assert not control.stop_requested()
    assert not control.save_requested()


def test_a_launch_by_the_batch_script_keeps_an_unanswered_stop_request(control, monkeypatch):
    monkeypatch.setenv("EMMA_JOB", "4242")
    control.clear_unanswered()
    assert control.stop_requested()
    assert not control.save_requested()


def test_a_refusal_is_recorded_only_when_the_batch_script_launched_the_run(control, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    control.record_refusal("in a shell in an allocation")
    monkeypatch.setenv("EMMA_JOB", "4240_3")
    control.record_refusal("by the job")
    assert (control.folder / "refused").read_text() == "4240_3\tby the job\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_requests_a_stop_and_the_first_signal_is_the_recorded_reason(control, number):
    control.clear_unanswered()
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    control.stop_on_signals()
    try:
        for each in (number, signal.SIGTERM):
            signal.raise_signal(each)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert control.stop_requested()
    assert not control.save_requested()
    assert control.stop_reason() == f"by {number.name}"


def test_a_signal_to_all_processes_makes_the_run_save_and_stop(recipe_file, shards, tmp_path):
    run, endless = tmp_path / "run", ["steps=100000", "checkpoint.every_steps=100000"]
    words = [recipe_file, f"data.shards={shards}", f"run.dir={run}", "data.workers=1", *endless]
    command = [sys.executable, "-m", "pipeline.train", *map(str, words)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: (run / "metrics.jsonl").exists() and '"loss' in (run / "metrics.jsonl").read_text(), "a step")
    (run / "checkpoints/latest").mkdir(parents=True)  # saving does not need the file of this name
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    assert any("--multiprocessing-fork" in member.cmdline() for member in family[:-1])
    for member in family:
        member.send_signal(signal.SIGUSR1)
    assert "Traceback" not in finish(process)
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"]) == ("stopped", "by SIGUSR1")
    assert list_steps(run / "checkpoints") == [outcome["step"]]


# Trains until it waits for data, and then receives SIGTERM. Rank 0 waits in compiled code, which delays Python's signal
# handlers; the other rank waits in Python.
WAIT = """
import os, signal, sys, threading, torch.distributed as dist
from pipeline import train
from pipeline.data.loader import TrainData

def wait(data, first):
    dist.barrier()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    dist.barrier() if data.ranks.is_main else threading.Event().wait()

setattr(TrainData, sys.argv.pop(1), wait)
train.main()
"""


@pytest.mark.parametrize("where", ["start_workers", "from_step"])
def test_sigterm_ends_a_start_that_waits_before_its_first_step(recipe_file, shards, tmp_path, where):
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(WAIT)
    process = fork_ranks(2, [program, where, recipe_file, f"data.shards={shards}", f"run.dir={run}"])
    output = finish(process, code=None, timeout=60)
    assert output.count("stopped by SIGTERM before the first step of this launch") == 1
    assert "Traceback" not in output and "error" not in output
    assert not (run / "outcome.json").exists()
    history = read_history(run) if where == "from_step" else History()
    assert state_of(run, history, time.time()).startswith("stopped")
