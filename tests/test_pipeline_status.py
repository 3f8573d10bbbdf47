"""The status command: the ledger of wall time, the state of a run, the table, JSON and figures."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.figures.curves import draw_run
from pipeline.metrics.history import has_event, read_history, replay
from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder
from pipeline.status import state_of, table
from tests.support.launch import REPOSITORY, fork_python, run_python

SPEEDS = {"speed/samples_per_s": 1.6, "speed/tokens_per_s": 1600.0, "speed/mfu": 0.4, "data/padding_ratio": 0.01}
SLOW = {"ranks/slowest": 3, "ranks/slowest_ratio": 1.5}


def step_line(step, time, step_s, wait_s=0.0, align=1.0):
    facts = {"loss/text": 2.0 / step, "loss/align": align, "time/step_s": step_s, "time/data_wait_s": wait_s}
    sources = {"loss/text/a": 2.0 / step, "data/samples/a": 8, "loss/text/b": None, "data/samples/b": 0}
    return {"step": step, "time": time, **facts, **SPEEDS, **SLOW, **sources}


def event(name, step, time, **facts):
    return {"event": name, "step": step, "time": time, **facts}


# Starts at time 100 and crashes after step 4. Resumes from step 2 at time 160 and is stopped at time 185. Resumes at
# time 200, loses a rank, resumes again at time 208, and finishes.
LINES = [
    event("start", 0, 110, began=100, total_steps=6),
    step_line(2, 120, 5, wait_s=1),
    event("save", 2, 123, seconds=3),
    step_line(4, 133, 5),
    event("resume", 2, 165, began=160, total_steps=6),
    step_line(4, 175, 5),
    step_line(5, 180, 5, align=None),
    event("save", 5, 184, seconds=4),
    event("stopped", 5, 185),
    event("resume", 5, 207, began=200, total_steps=6, start_s={"imports": 1, "checkpoint": 3}),
    event("lost", 5, 208, reason="rank 1 has ended"),
    event("failed", None, 208, reason="RuntimeError: connection closed"),
    event("resume", 5, 210, began=208, total_steps=6),
    step_line(6, 215, 5),
    event("spike", 6, 215, key="loss/total", value=3.0, usual=1.0, z=9.5, samples=[1]),
    event("nonfinite", 6, 215, samples=[1]),
    event(
        "heldout", 6, 219, seconds=4, **{"heldout/loss/text": 0.5, "heldout/loss/align": 1, "heldout/loss/text/a": 0.5}
    ),
    event("done", 6, 219),
]


def test_the_time_ledger_assigns_every_second_to_exactly_one_category():
    ledger = replay(LINES).ledger
    assert ledger.total == 119
    assert ledger.starting == 10 + 5 + 4 + 2
    assert ledger.resuming == 3
    assert ledger.evaluating == 4
    assert ledger.saving == 3 + 4
    assert ledger.waiting_for_data == 2
    assert ledger.redone_steps == 10
    assert ledger.training == 8 + 10 + 5 + 5
    assert ledger.down == 160 - 133
    assert ledger.queued == 200 - 185
    assert ledger.parts["other"] == pytest.approx(2)
    assert sum(ledger.parts.values()) == ledger.total
    assert ledger.goodput == pytest.approx(28 / 119)


DAMAGE = [b"\xff\xfe\x00", b"123", b"null", b'{"st\xffep": 5, "time": 1}', b"[" * 9999, b'"a\xe2\x80\xa8b"']


def test_status_skips_damaged_lines_and_reads_files_that_are_not_utf_8(tmp_path):
    lines = [json.dumps(line).encode() + b"\n" for line in LINES]
    damaged = [part for line, damage in zip(lines, DAMAGE * 3, strict=True) for part in (damage, b"\n", line)]
    lost = b'{"event": "lost", "step": 6, "time": 220, "reason": "caf\xe9\xe2\x80\xa8"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(damaged[:-1]) + lost + b'{"step": 7, "ti')
    (tmp_path / "outcome.json").write_bytes(b'{"outcome": "lost\xff')
    history = read_history(tmp_path)
    assert history.losses == replay(LINES).losses
    assert state_of(tmp_path, history, 300) == "lost: caf\ufffd\u2028"
    assert has_event(tmp_path, "spike", 6)
    (tmp_path / "control").mkdir()
    (tmp_path / "control/starting").write_bytes(b"failed: caf\xe9\n")
    assert state_of(tmp_path, history, 300) == "failed: caf\ufffd"
    done = fork_python("-m", "pipeline.status", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "failed: caf\\ufffd, step 6 of 6" in done.stdout


def test_status_reads_a_log_in_which_the_lines_of_the_launches_are_damaged():
    history = replay([line for line in LINES if line.get("event") not in ("start", "resume")])
    assert (history.step, history.losses) == (6, replay(LINES).losses)


def test_save_and_stop_events_between_log_lines_advance_the_last_known_step():
    assert replay([*LINES[:3], event("save", 3, 124, seconds=1)]).step == 3
    assert replay([*LINES[:3], event("stopped", 3, 124)]).step == 3


def test_the_time_left_is_estimated_from_the_current_launchs_speed_and_saves():
    start = event("resume", 2, 130, began=125, total_steps=8)
    save = event("save", 4, 143, seconds=3)
    assert replay([*LINES[:3], start, step_line(4, 140, 5), save]).left_s == 4 * (5 + 3 / 2)


def test_has_event_matches_the_name_and_the_step_of_an_event(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)) + '\n{"cut off')
    assert has_event(tmp_path, "heldout", 6)
    assert not has_event(tmp_path, "heldout", 5)


def test_each_launch_in_the_history_states_how_the_previous_launch_ended():
    starts = replay(LINES).starts
    assert [(start.step, start.before) for start in starts] == [
        (0, ""),
        (2, "killed or crashed"),
        (5, "stopped"),
        (5, "lost: rank 1 has ended"),
    ]


def test_the_status_table_shows_progress_speed_restarts_warnings_and_sources(tmp_path):
    text = table(tmp_path, replay(LINES), now=219)
    for part in (
        "step 6 of 6, 0:00:00 left",
        "recent speed: 1.6 samples/s, 1600 tok/s, MFU 40.0%, padding 1.0%",
        "rank 3 takes 1.50 times as long",
        "resumed at step 5 after it was lost: rank 1 has ended",
        "steps without a finite loss or gradient: 6",
        "spikes at steps 6 (total 3, z 10)",
    ):
        assert part in text
    [a] = [line.split() for line in text.splitlines() if line.startswith("a ")]
    assert a == ["a", "32", f"{sum(2.0 / step for step in (2, 4, 5, 6)) / 4:.4f}", "0.5000"]
    [b] = [line.split() for line in text.splitlines() if line.startswith("b ")]
    assert b == ["b", "0", "-", "-"]


def test_a_spike_in_a_repeated_step_is_listed_only_once():
    spike = event("spike", 3, 30, key="loss/total", value=3.0, usual=1.0, z=9.0, samples=[1])
    again = event("resume", 2, 40, began=40, total_steps=6)
    history = replay([event("start", 0, 0, began=0, total_steps=6), spike, again, spike | {"time": 50}])
    assert len(history.spikes) == 1


def test_the_time_of_a_log_line_is_split_between_repeated_and_new_steps():
    lines = [
        event("start", 0, 10, began=10, total_steps=9),
        step_line(4, 14, 1),
        event("resume", 2, 20, began=20, total_steps=9),
        step_line(6, 24, 1),
    ]
    ledger = replay(lines).ledger
    assert (ledger.training, ledger.redone_steps) == (4 + 2, 2)


@pytest.mark.parametrize(
    ("outcome", "silent_s", "state"),
    [
        (None, 5, "running"),
        (None, 1900, "dead: silent for 0:31:40"),
        ({"outcome": "done", "step": 6, "reason": ""}, 500, "done"),
        ({"outcome": "stopped", "step": 6, "reason": "by hand"}, 500, "stopped by hand"),
        ({"outcome": "failed", "step": None, "reason": "no finite loss"}, 5, "failed: no finite loss"),
        ({"outcome": "lost", "step": 6, "reason": "rank 1 has ended"}, 5, "lost: rank 1 has ended"),
    ],
)
def test_the_state_of_a_run_depends_on_its_outcome_and_the_time_since_its_last_log(tmp_path, outcome, silent_s, state):
    if outcome:
        (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    history = replay(LINES[:4])
    assert state_of(tmp_path, history, now=history.last_time + silent_s) == state
    assert state in table(tmp_path, history, now=history.last_time + silent_s)


@pytest.mark.parametrize("lines", [LINES[:1], LINES[:4]], ids=["in its first step", "in a save or an evaluation"])
def test_a_run_with_a_recent_heartbeat_is_reported_as_running(tmp_path, lines):
    history, alive = replay(lines), tmp_path / "control/alive"
    alive.parent.mkdir()
    alive.touch()
    os.utime(alive, times=(history.last_time + 3600,) * 2)
    assert state_of(tmp_path, history, now=history.last_time + 3605) == "running"
    assert state_of(tmp_path, history, now=history.last_time + 3725) == "dead: silent for 0:02:05"


def test_a_heartbeat_older_than_the_last_log_line_does_not_mark_a_run_as_dead(tmp_path):
    alive = tmp_path / "control/alive"
    alive.parent.mkdir()
    alive.touch()
    os.utime(alive, times=(0, 0))
    history = replay(LINES[:5])
    assert state_of(tmp_path, history, now=history.last_time + 100) == "running"


def test_the_status_shows_no_time_left_before_a_step_was_timed(tmp_path):
    begun = event("start", 0, 110, began=100, total_steps=1000)
    assert table(tmp_path, replay([begun]), now=240).splitlines()[0] == f"{tmp_path}: running, step 0 of 1000"


def test_the_state_shows_a_crash_and_not_the_lost_ranks_that_it_caused(tmp_path):
    crash = event("failed", None, 134, reason="RuntimeError: out of memory")
    history = replay([*LINES[:4], crash])
    assert state_of(tmp_path, history, now=135) == state_of(tmp_path, history, now=9999)
    assert state_of(tmp_path, history, now=135) == "failed: RuntimeError: out of memory"
    lost = {"outcome": "lost", "step": 4, "reason": "rank 1 has ended"}
    (tmp_path / "outcome.json").write_text(json.dumps(lost))
    history = replay([*LINES[:4], crash, event("lost", 4, 135, reason="rank 1 has ended")])
    assert state_of(tmp_path, history, now=136) == "failed: RuntimeError: out of memory"


@pytest.fixture
def starting(recipe_file, tmp_path):
    """Return a launch that is starting up in the run folder of a stopped run."""
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": 5, "reason": "by SIGUSR1"}))
    recipe = load_recipe(recipe_file, [f"run.dir={tmp_path}"], planning=True)
    run = RunFolder(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    yield run
    run.lock.close()


def state_later(run, seconds):
    return state_of(run.folder, replay(LINES[:9]), now=time.time() + seconds)


def test_a_run_that_starts_up_for_too_long_is_reported_as_dead(starting):
    assert state_later(starting, 300) == "starting"
    assert state_later(starting, 3 * 3600) == "dead: still starting after 3:00:00"
    starting.accept_start(5, {})
    assert state_later(starting, 0) == "stopped", (
        "after acceptance, the state must be that of the last event in metrics.jsonl"
    )


def test_a_launch_writes_no_heartbeat_before_it_is_accepted(starting):
    starting.heartbeat()
    assert not starting.heartbeat_file.exists()
    starting.accept_start(5, {})
    starting.heartbeat()
    assert starting.heartbeat_file.exists()


def test_a_refused_launch_does_not_change_the_state_of_the_run(starting):
    starting.write_outcome("failed", reason="optim.lr was 0.001, now 0.003")
    assert state_later(starting, 0) == "stopped by SIGUSR1"
    starting.write_outcome("lost", step=0, reason="rank 0 has ended")
    assert state_later(starting, 0) == "stopped by SIGUSR1"


def test_the_state_shows_the_first_recorded_reason_of_a_failed_launch(starting):
    starting.record_failed_start("failed: OSError: no such device")
    starting.write_outcome("lost", step=0, reason="rank 1 has ended")
    assert state_later(starting, 0) == "failed: OSError: no such device"


def test_the_status_shows_a_crash_during_start_up_and_in_the_training_loop(recipe_file, shards, tmp_path):
    arguments = [recipe_file, f"data.shards={shards}", f"run.dir={tmp_path}"]
    for function in ("build_engine", "Loop.run"):
        crashing = f"from pipeline import train; train.{function} = lambda *_: 1 / 0; train.main()"
        assert fork_python("-c", crashing, *arguments).returncode == 1
        text = run_python("-m", "pipeline.status", tmp_path).stdout
        assert text.startswith(f"{tmp_path}: failed: ZeroDivisionError: division by zero"), function


def test_the_status_table_shows_the_start_up_phases_of_the_last_launch(tmp_path):
    text = table(tmp_path, replay(LINES[:10]), now=208)
    assert "start-up of the last launch: 4.0 s (imports 1.0, checkpoint 3.0)\n" in text + "\n"
    assert "start-up" not in table(tmp_path, replay(LINES[:9]), now=208), (
        "a launch without logged phases must show none"
    )


def test_a_nonfinite_loss_is_null_in_the_json_output_of_status(tmp_path):
    lines = [LINES[0], step_line(2, 120, 5) | {"loss/text": None, "loss/align": None}, step_line(4, 130, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = run_python("-m", "pipeline.status", tmp_path, "--json").stdout
    facts = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert facts["losses"] == {"2": [None, None], "4": [0.5, 1.0]}


def test_an_unwritable_figure_file_is_a_one_line_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    done = run_python("-m", "pipeline.status", tmp_path, "--png", tmp_path / "absent/loss.png")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "absent/loss.png" in line


def test_the_status_command_prints_no_error_when_its_output_pipe_is_closed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline.status", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""


def test_a_truncated_line_in_the_metrics_file_is_ignored(tmp_path):
    text = "\n".join(map(json.dumps, LINES[:4]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 5, "ti')
    assert read_history(tmp_path).step == 4
    later = "\n".join(map(json.dumps, LINES[4:]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 5, "ti\n' + later)
    assert read_history(tmp_path).ledger == replay(LINES).ledger


def test_the_status_of_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no run found in this folder"):
        read_history(tmp_path)


def test_draw_run_writes_a_png(tmp_path):
    draw_run(replay(LINES), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", ["pipeline.status", "pipeline.train"])
def test_status_and_train_do_not_import_matplotlib_at_start_up(module):
    program = f"import sys, {module}; sys.exit('matplotlib' in sys.modules)"
    assert run_python("-c", program).returncode == 0
