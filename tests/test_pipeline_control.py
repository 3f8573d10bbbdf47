"""Requests from outside, as one rank sees them. That all agree and save is in test_pipeline_train.py."""

import pytest

from pipeline.control import Control


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Of a run folder in which somebody has asked for a stop, and nobody was there."""
    monkeypatch.delenv("EMMA_JOB", raising=False)
    (tmp_path / "control").mkdir()
    (tmp_path / "control/stop").touch()
    return Control(tmp_path)


def test_a_request_that_nobody_answered_ends_no_later_training_in_a_shell_in_an_allocation(control, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    control.clear()
    assert control.requests() == (False, False)


def test_a_request_that_came_after_the_batch_script_had_cleared_away_the_old_ones_stands(control, monkeypatch):
    monkeypatch.setenv("EMMA_JOB", "4242")
    control.clear()
    assert control.requests() == (True, False)


def test_the_batch_script_is_told_of_a_refusal_and_nobody_else_is(control, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    control.refuse("in a shell in an allocation")
    monkeypatch.setenv("EMMA_JOB", "4240_3")
    control.refuse("by the job")
    assert (control.folder / "refused").read_text() == "4240_3\tby the job\n"
