"""The journal of answers: resuming, incomplete lines, and refusing answers of other models and settings."""

import os
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline.inference.journal import Journal

KEY = {"weights_sha256": "ab12", "max_new_tokens": 16, "stop": ("\n",)}


def write(path: Path, **answers: str) -> bytes:
    with Journal(path, KEY) as journal:
        for question_id, answer in answers.items():
            journal.add(question_id, answer)
    return path.read_bytes()


def test_a_reopened_journal_has_all_answers_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "j", a="red\n\u2028\ud800", b="")
    write(tmp_path / "j", c="blue")
    with Journal(tmp_path / "j", KEY) as journal:
        assert journal.answers == {"a": "red\n\u2028\ud800", "b": "", "c": "blue"}
        assert (journal.get("b"), journal.get("z")) == ("", None)


def test_an_added_answer_is_in_the_file_before_the_journal_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.add("a", "red")
    assert (tmp_path / "j").read_text().endswith('{"id": "a", "answer": "red"}\n')
    journal.close()


def test_a_journal_cut_at_any_byte_keeps_its_complete_lines_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = write(path, a="red", b="blue")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = max(whole[:cut].count(b"\n") - 1, 0)
        with Journal(path, KEY) as journal:
            assert list(journal.answers) == ["a", "b"][:complete]
            for question_id, answer in [("a", "red"), ("b", "blue")][complete:]:
                journal.add(question_id, answer)
        assert path.read_bytes() == whole


def test_a_last_line_that_is_damaged_but_ends_with_a_newline_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = write(path, a="red")
    path.write_bytes(whole + b'{"id": "b", "ans\n')
    assert write(path) == whole


@pytest.mark.parametrize("change", [{"weights_sha256": "cd34"}, {"max_new_tokens": 17}, {"temperature": 0.5}])
def test_answers_of_another_model_or_of_other_settings_are_kept_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "j"
    write(path, a="red")
    with Journal(path, {**KEY, **change}) as journal:
        assert journal.answers == {}
        journal.add("a", "green")
    write(path, b="blue")
    for key, answers in ((KEY, {"a": "red", "b": "blue"}), ({**KEY, **change}, {"a": "green"})):
        with Journal(path, key) as journal:
            assert journal.answers == answers


@pytest.mark.parametrize(
    "content", [b"a note", b"a note\nand more", b"[1]\n", b'{"id": "a", "answer": "b"}\n', b"\xff\n"]
)
def test_a_file_that_is_not_a_journal_is_refused_and_left_unchanged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(UserError, match="line 1: not a line of an answer journal"):
        Journal(tmp_path / "j", KEY)
    assert (tmp_path / "j").read_bytes() == content


def test_a_damaged_line_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "j", a="red", b="blue")
    (tmp_path / "j").write_bytes(whole.replace(b'{"id": "a"', b'{"id" "a"'))
    with pytest.raises(UserError, match="line 2: not a line"):
        Journal(tmp_path / "j", KEY)


def test_a_journal_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", KEY), pytest.raises(UserError, match="another process is writing this journal"):
        Journal(tmp_path / "j", KEY)
    write(tmp_path / "j", a="red")


def test_a_refused_journal_leaves_no_open_file(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("a note")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(UserError):
        Journal(tmp_path / "j", KEY)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
