"""A rank that hangs or dies ends the run within seconds, with stacks and a word that says to try again."""

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
        assert time.monotonic() < until, "it did not get that far"
        time.sleep(0.05)


def told(run: Path) -> tuple[dict, dict]:
    """The outcome, and the last event."""
    return json.loads((run / "outcome.json").read_text()), json.loads(
        (run / "metrics.jsonl").read_text().splitlines()[-1]
    )


def test_a_rank_that_hangs_ends_the_run_with_the_others_stacks(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    process = torchrun(2, ["--shutdown-timeout=1", *words(recipe_file, shards, run), *IMPATIENT])
    wait_for_steps(run, FIRST_STEPS + 1)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))
    ranks[0].send_signal(signal.SIGSTOP)
    output = finish(process, code=None, timeout=90)
    assert not any(rank.is_running() for rank in ranks)
    assert "error: step" in output
    outcome, event = told(run)
    assert outcome["outcome"] == event["event"] == "lost"
    assert "takes longer than" in outcome["reason"]
    assert "rank 0 is stopped" in outcome["reason"]
    [stacks] = run.glob("stacks/*/rank-1.txt")
    assert re.search("optimizer_step|reduce_step", stacks.read_text())
    assert "in _watch" in stacks.read_text()
    assert state_of_run(run, read_history(run), now=time.time()) == f"lost: {outcome['reason']}"


def test_a_rank_that_dies_ends_the_others_even_without_a_launcher(recipe_file, shards, tmp_path):
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
    outcome, event = told(run)
    assert (outcome["outcome"], outcome["reason"]) == ("lost", "rank 0 has ended")
    assert (event["event"], event["reason"]) == ("lost", "rank 0 has ended")


@pytest.fixture
def watchdog(recipe_file, tmp_path):
    limits = ["watchdog.slow_factor=10", "watchdog.least_s=20", "watchdog.first_s=500"]
    recipe = load_recipe(recipe_file, [*limits, f"run.dir={tmp_path}"], planning=True)
    ranks = Ranks(1, 1, 2, torch.device("cpu"))
    run = RunFolder(recipe, ranks)
    run.first_step = 0
    yield Watchdog(run, ranks)
    faulthandler.cancel_dump_traceback_later()


def test_the_first_steps_may_take_long_and_later_ones_as_much_as_is_usual(watchdog):
    for _ in range(FIRST_STEPS - 1):
        watchdog.step_times.append(1.0)
    assert watchdog.step_limit_s() == 500
    watchdog.step_times.append(1.0)
    assert watchdog.step_limit_s() == 20
    watchdog.step_times.extend([7.0] * FIRST_STEPS * 2)
    assert watchdog.step_limit_s() == 70


def test_a_save_or_an_evaluation_may_take_long_and_the_next_step_not(watchdog):
    watchdog.step_times.extend([1.0] * FIRST_STEPS)
    with watchdog.allow_time_for("the save"):
        assert watchdog.deadline[:2] == ("the save", 500)
    assert watchdog.deadline[:2] == ("step 1", 20)


def test_what_comes_after_the_steps_may_take_long_also_after_an_error(watchdog):
    watchdog.step_times.extend([1.0] * FIRST_STEPS)
    with pytest.raises(ZeroDivisionError), watchdog.allow_time_to_finish():
        raise ZeroDivisionError
    assert watchdog.deadline[:2] == ("the end", 500)


class Waits:
    """An event that is set after some waits, during each of which the clock goes on as told."""

    def __init__(self, monkeypatch, *seconds):
        self.now, self.seconds = 0.0, list(seconds)
        monkeypatch.setattr("pipeline.run.watchdog.time.monotonic", lambda: self.now)

    def wait(self, timeout):
        if self.seconds:
            self.now += self.seconds.pop(0)
            return False
        return True


def test_the_time_of_a_suspension_does_not_count(watchdog, monkeypatch):
    watchdog._set_deadline("step 1", 20)
    watchdog.closed = Waits(monkeypatch, 1, 1, 3600, 1)
    watchdog._keep_time()
    assert watchdog.active_s == 3 + SUSPENDED_S


def test_while_it_watches_it_gives_signs_of_life_and_a_file_system_that_fails_stops_it_not(watchdog, monkeypatch):
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


def test_a_rank_whose_watchdog_hangs_itself_ends_all_the_same(watchdog, monkeypatch):
    watchdog._set_deadline("step 1", 20)
    watchdog.closed = Waits(monkeypatch, *[1] * 1000)
    monkeypatch.setattr("pipeline.run.watchdog.os._exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        watchdog._keep_time()
    assert end.value.code == ExitCode.RETRY
    assert watchdog.active_s == 20 + 2 * STUCK_S + 1


def test_a_mistake_that_a_rank_has_told_of_is_not_overwritten(watchdog, tmp_path):
    watchdog.folder = tmp_path / "stacks"
    watchdog.folder.mkdir()
    (tmp_path / "outcome.json").write_text('{"outcome": "failed"}')
    assert watchdog._report("rank 1 has ended") == 1
    assert (tmp_path / "outcome.json").read_text() == '{"outcome": "failed"}'


def test_a_rank_ends_in_time_though_the_run_folder_takes_no_stacks(watchdog, tmp_path, monkeypatch, capfd):
    """A full disk, say: there a file stands where the folder would."""
    watchdog.folder = tmp_path / "file" / "stacks"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pipeline.run.watchdog.GRACE_S", 0.0)
    monkeypatch.setattr("pipeline.run.watchdog.os._exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        watchdog._end_process("rank 0 has ended")
    assert end.value.code == ExitCode.RETRY
    said = capfd.readouterr().err
    assert "error: rank 0 has ended; cannot write stacks to the run folder" in said
    assert "_end_process" in said, "no stacks in the log"


def test_a_file_system_that_fails_does_not_end_the_watching(watchdog, tmp_path, monkeypatch):
    watchdog.folder = tmp_path
    monkeypatch.setattr(Path, "exists", stale)
    assert not watchdog._another_rank_ends()


def stale(path):
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_process_is_seen_to_be_there_or_not():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_state(child.pid) in ("R", "S", "D")
    child.communicate()
    assert process_state(child.pid) == ""
