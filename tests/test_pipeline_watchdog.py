"""The watchdog: hanging and dead ranks end the run with the retry exit code; time limits and heartbeats."""

import errno
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from model.errors import ExitCode
from pipeline.demo.processes import free_ports
from pipeline.distributed.processes import process_state
from pipeline.distributed.ranks import Ranks
from pipeline.metrics.history import read_history
from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder
from pipeline.run.watchdog import FIRST_STEPS, STUCK_S, SUSPENDED_S, Watchdog
from pipeline.status import state_of as state_of_run
from tests.support.launch import REPOSITORY, finish, torchrun

ENDLESS = ["steps=100000", "checkpoint.every_steps=100000"]
IMPATIENT = ["watchdog.least_s=6", "watchdog.slow_factor=5"]


def words(recipe_file, shards, run):
    return ["-m", "pipeline.train", recipe_file, f"data.shards={shards}", f"run.dir={run}", *ENDLESS]


def wait_for_steps(run: Path, count: int) -> None:
    until = time.monotonic() + 180
    lines = run / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) <= count:
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def outcome_and_last_event(run: Path) -> tuple[dict, dict]:
    return json.loads((run / "outcome.json").read_text()), json.loads(
        (run / "metrics.jsonl").read_text().splitlines()[-1]
    )


def test_a_hanging_rank_ends_the_run_and_the_other_ranks_write_their_stacks(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    process = torchrun(2, ["--shutdown-timeout=1", *words(recipe_file, shards, run), *IMPATIENT])
    wait_for_steps(run, FIRST_STEPS + 1)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))
    ranks[0].send_signal(signal.SIGSTOP)
    output = finish(process, code=None, timeout=90)
    assert not any(rank.is_running() for rank in ranks)
    assert "error: step" in output
    outcome, event = outcome_and_last_event(run)
    assert outcome["outcome"] == event["event"] == "lost"
    assert "takes longer than" in outcome["reason"]
    assert "rank 0 is stopped" in outcome["reason"]
    [stacks] = run.glob("stacks/*/rank-1.txt")
    assert re.search("optimizer_step|reduce_step", stacks.read_text())
    assert "in _watch" in stacks.read_text()
    assert state_of_run(run, read_history(run), now=time.time()) == f"lost: {outcome['reason']}"


def test_a_killed_rank_ends_the_other_ranks_even_without_torchrun(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, *map(str, words(recipe_file, shards, run))]
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    wait_for_steps(run, 1)
    ranks[0].kill()
    _, error = ranks[1].communicate(timeout=60)
    ranks[0].communicate()
    assert ranks[1].returncode == ExitCode.RETRY, error
    assert "Traceback" not in error
    outcome, event = outcome_and_last_event(run)
    assert (outcome["outcome"], outcome["reason"]) == ("lost", "rank 0 has ended")
    assert (event["event"], event["reason"]) == ("lost", "rank 0 has ended")


@pytest.fixture
def watchdog(recipe_file, tmp_path):
    limits = ["watchdog.slow_factor=10", "watchdog.least_s=20", "watchdog.first_s=500"]
    recipe = load_recipe(recipe_file, [*limits, f"run.dir={tmp_path}"], planning=True)
    ranks = Ranks(rank=1, local_rank=1, world_size=2, device=torch.device("cpu"))
    run = RunFolder(recipe, ranks)
    run.first_step = 0
    yield Watchdog(run, ranks)
    faulthandler.cancel_dump_traceback_later()


def test_the_first_steps_have_a_longer_time_limit_than_later_steps(watchdog):
    for _ in range(FIRST_STEPS - 1):
        watchdog.step_times.append(1.0)
    assert watchdog.step_limit_s() == 500
    watchdog.step_times.append(1.0)
    assert watchdog.step_limit_s() == 20
    watchdog.step_times.extend([7.0] * FIRST_STEPS * 2)
    assert watchdog.step_limit_s() == 70


def test_a_save_has_a_longer_time_limit_than_the_next_step(watchdog):
    watchdog.step_times.extend([1.0] * FIRST_STEPS)
    with watchdog.allow_time_for("the save"):
        assert watchdog.deadline[:2] == ("the save", 500)
    assert watchdog.deadline[:2] == ("step 1", 20)


def test_the_end_of_a_run_has_a_longer_time_limit_even_after_an_error(watchdog):
    watchdog.step_times.extend([1.0] * FIRST_STEPS)
    with pytest.raises(ZeroDivisionError), watchdog.allow_time_to_finish():
        raise ZeroDivisionError
    assert watchdog.deadline[:2] == ("shutdown", 500)


class Waits:
    """A fake of the `closed` event. Each wait advances a fake clock by the next value; then the event is set."""

    def __init__(self, monkeypatch, *seconds):
        self.now, self.seconds = 0.0, list(seconds)
        monkeypatch.setattr("pipeline.run.watchdog.time.monotonic", lambda: self.now)

    def wait(self, timeout):
        if self.seconds:
            self.now += self.seconds.pop(0)
            return False
        return True


def test_time_while_the_process_was_suspended_does_not_count_for_the_deadline(watchdog, monkeypatch):
    watchdog._set_deadline("step 1", 20)
    watchdog.closed = Waits(monkeypatch, 1, 1, 3600, 1)
    watchdog._keep_time()
    assert watchdog.active_s == 3 + SUSPENDED_S


def test_the_watchdog_continues_its_heartbeats_after_a_file_system_error(watchdog, monkeypatch):
    def beat():
        beats.append("beat")
        raise OSError(errno.ESTALE, "Stale file handle")

    beats = list[str]()
    watchdog.folder, watchdog.peers = Path("none"), {}
    watchdog._set_deadline("step 1", 20)
    watchdog.closed = Waits(monkeypatch, 1, 1, 1)
    monkeypatch.setattr(watchdog.run, "heartbeat", beat)
    watchdog._watch()
    assert len(beats) == 3


def test_the_timekeeper_thread_ends_the_rank_if_the_watchdog_thread_hangs(watchdog, monkeypatch):
    watchdog._set_deadline("step 1", 20)
    watchdog.closed = Waits(monkeypatch, *[1] * 1000)
    monkeypatch.setattr("pipeline.run.watchdog.os._exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        watchdog._keep_time()
    assert end.value.code == ExitCode.RETRY
    assert watchdog.active_s == 20 + 2 * STUCK_S + 1


def test_the_watchdog_does_not_overwrite_an_outcome_that_another_rank_wrote(watchdog, tmp_path):
    watchdog.folder = tmp_path / "stacks"
    watchdog.folder.mkdir()
    (tmp_path / "outcome.json").write_text('{"outcome": "failed"}')
    assert watchdog._report("rank 1 has ended") == 1
    assert (tmp_path / "outcome.json").read_text() == '{"outcome": "failed"}'


def test_a_rank_still_ends_if_its_stacks_cannot_be_written_to_the_run_folder(watchdog, tmp_path, monkeypatch, capfd):
    """Simulate the full disk with a file in place of the folder for stacks."""
    watchdog.folder = tmp_path / "file" / "stacks"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pipeline.run.watchdog.GRACE_S", 0.0)
    monkeypatch.setattr("pipeline.run.watchdog.os._exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        watchdog._end_process("rank 0 has ended")
    assert end.value.code == ExitCode.RETRY
    errors = capfd.readouterr().err
    assert "error: rank 0 has ended; cannot write stacks to the run folder" in errors
    assert "_end_process" in errors, "the stacks were not printed to stderr instead"


def test_a_file_system_error_is_not_mistaken_for_the_end_of_another_rank(watchdog, tmp_path, monkeypatch):
    watchdog.folder = tmp_path
    monkeypatch.setattr(Path, "exists", stale)
    assert not watchdog._another_rank_ends()


def stale(path):
    raise OSError(errno.ESTALE, "Stale file handle")


def test_process_state_returns_an_empty_string_for_a_process_that_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_state(child.pid) in ("R", "S", "D")
    child.communicate()
    assert process_state(child.pid) == ""
