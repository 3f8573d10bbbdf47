"""Progress of a build: lines in a log, a bar on a terminal, and progress.json."""

import io
import json
from pathlib import Path

import pytest

from preprocess import progress
from preprocess.progress import Progress, format_duration
from preprocess.shards.folder import ShardFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_progress_in_a_log_is_printed_once_every_ten_seconds(tmp_path: Path, now: list[float]) -> None:
    log = io.StringIO()
    shown = Progress(ShardFolder(tmp_path), total=1000, reused=400, stream=log)
    for _ in range(21):
        shown.tick()
        now[0] += 1
        shown.add(10, {"a": 1})
    assert log.getvalue().splitlines() == [
        "400/1000 dialogues (40%)  0.0/s  0 rejected  ? left",
        "500/1000 dialogues (50%)  10.0/s  10 rejected  0:00:50 left",
        "600/1000 dialogues (60%)  10.0/s  20 rejected  0:00:40 left",
    ]


def test_progress_on_a_terminal_is_one_redrawn_bar(tmp_path: Path, now: list[float]) -> None:
    terminal = Terminal()
    shown = Progress(ShardFolder(tmp_path), total=10, stream=terminal)
    shown.tick()
    now[0] += 1
    shown.add(10, {})
    shown.tick(last=True)
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().count("\n") == 1
    assert "█" * progress.BAR_CHARACTERS in terminal.getvalue()


def test_progress_json_contains_the_current_progress(tmp_path: Path, now: list[float]) -> None:
    shown = Progress(ShardFolder(tmp_path), total=100, stream=io.StringIO())
    now[0] += 4
    shown.add(20, {"a": 2})
    shown.tick()
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "state": "building",
        "dialogues": {"done": 20, "total": 100, "reused": 0},
        "rejects": {"a": 2},
        "dialogues_per_s": 5.0,
        "elapsed_s": 4.0,
        "left_s": 16.0,
    }


def test_progress_of_a_build_without_dialogues_has_no_time_left(tmp_path: Path, now: list[float]) -> None:
    shown = Progress(ShardFolder(tmp_path), total=0, stream=io.StringIO())
    shown.tick(last=True)
    assert shown.report("done")["left_s"] is None


def test_durations_are_formatted_as_hours_minutes_and_seconds() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
