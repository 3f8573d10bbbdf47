"""The ledger adds up: every second of a run with a crash and a stop is named once."""

import json

import pytest

from model.errors import UserError
from pipeline.status import draw, read_history, state_of, table, tell


def step_line(step, time, step_s, wait_s=0.0, align=1.0):
    facts = {"loss/text": 2.0 / step, "loss/align": align, "time/step_s": step_s, "time/data_wait_s": wait_s}
    return {"step": step, "time": time, **facts}


def event(name, step, time, **facts):
    return {"event": name, "step": step, "time": time, **facts}


# Began at 100; crashed some time after step 4; resumed at 2 at 160; stopped; queued from 185 to 200; done.
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
    event("resume", 5, 207, began=200, total_steps=6),
    step_line(6, 212, 5),
    event("done", 6, 212),
]


def test_every_second_is_named_once():
    ledger = tell(LINES).ledger
    assert ledger.total == 112
    assert ledger.starting == 10 + 5 + 7
    assert ledger.saving == 3 + 4
    assert ledger.waiting_for_data == 2
    assert ledger.redone_steps == 10
    assert ledger.training == 8 + 10 + 5 + 5
    assert ledger.down == (160 - 133) + (200 - 185)
    assert ledger.other == pytest.approx(1)
    assert ledger.goodput == pytest.approx(28 / 112)


def test_restarts_tell_how_the_start_before_had_ended():
    starts = tell(LINES).starts
    assert [(start.step, start.before) for start in starts] == [(0, ""), (2, "killed or crashed"), (5, "stopped")]


def test_a_log_line_that_covers_old_and_new_steps_is_divided():
    lines = [
        event("start", 0, 10, began=10, total_steps=9),
        step_line(4, 14, 1),
        event("resume", 2, 20, began=20, total_steps=9),
        step_line(6, 24, 1),
    ]
    ledger = tell(lines).ledger
    assert (ledger.training, ledger.redone_steps) == (4 + 2, 2)


@pytest.mark.parametrize(
    ("outcome", "silent_s", "state"),
    [
        (None, 5, "running"),
        (None, 500, "dead: silent for 0:08:20"),
        ({"outcome": "done", "step": 6, "reason": ""}, 500, "done"),
        ({"outcome": "failed", "step": None, "reason": "no finite loss"}, 5, "failed: no finite loss"),
    ],
)
def test_the_state_is_read_off_the_outcome_and_the_silence(tmp_path, outcome, silent_s, state):
    if outcome:
        (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    history = tell(LINES[:4])
    assert state_of(tmp_path, history, now=history.last_time + silent_s) == state
    assert state in table(tmp_path, history, now=history.last_time + silent_s)


def test_a_line_that_was_cut_off_by_a_kill_is_passed_over(tmp_path):
    text = "\n".join(map(json.dumps, LINES[:4]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 5, "ti')
    assert read_history(tmp_path).step == 4
    later = "\n".join(map(json.dumps, LINES[4:]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 5, "ti\n' + later)
    assert read_history(tmp_path).ledger == tell(LINES).ledger


def test_a_folder_that_is_no_run_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no run to tell of"):
        read_history(tmp_path)


def test_the_losses_are_drawn(tmp_path):
    draw(tell(LINES), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
