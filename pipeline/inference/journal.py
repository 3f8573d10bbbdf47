"""Journal of answers: a JSONL file that keeps every computed answer, so that the same command resumes after a kill.

The first line holds the key: everything that an answer depends on, besides its question. The other lines hold the
answers:

    {"format": 1, "key": {"weights_sha256": "…", "max_new_tokens": 64}}
    {"id": "…", "answer": "a red car"}
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from model.errors import UserError

FORMAT = 1


class Journal:
    """Answers by the id of their question. Each answer is written to the file as soon as it is added.

    A line that a killed process left incomplete at the end of the file is dropped. Only one process at a time can
    open a journal.

    Attributes:
        answers: Answers by question id.

    Args:
        path: JSONL file, which is created if it does not exist. Its folder must exist.
        key: Values that the answers depend on, such as the sha256 of the weights and the generation settings.

    Raises:
        UserError: If the file has another key or is not a journal, or if another process uses it.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(json.loads(json.dumps(key)))
        except BaseException:
            self._file.close()
            raise

    def get(self, question_id: str) -> Any | None:
        """Return the answer to a question, or None if the journal has none."""
        return self.answers.get(question_id)

    def add(self, question_id: str, answer: Any) -> None:
        """Append an answer, which must be a JSON value other than None. A later kill of this process cannot lose it."""
        self._append({"id": question_id, "answer": answer})
        self.answers[question_id] = answer

    def close(self) -> None:
        """Sync the file to disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing this journal. Wait until it has ended.") from None
        except OSError:
            pass  # some network file systems have no locks

    def _read(self, key: dict[str, Any]) -> None:
        """Read the answers, drop an incomplete last line, and write the first line of a new journal."""
        header = {"format": FORMAT, "key": key}
        self._file.seek(0)
        lines = self._file.readlines()
        if not lines or (lines[0] != _encode(header) and _encode(header).startswith(lines[0])):
            self._file.truncate(0)
            self._append(header)
            return
        self._check_header(lines[0], key)
        for number, line in enumerate(lines[1:], 2):
            try:
                row = json.loads(line if line.endswith(b"\n") else b"")
                self.answers[row["id"]] = row["answer"]
            except (ValueError, KeyError, TypeError):  # noqa: PERF203
                if number < len(lines):
                    raise self._not_a_journal(number) from None
                self._file.truncate(sum(map(len, lines[:-1])))

    def _check_header(self, line: bytes, key: dict[str, Any]) -> None:
        try:
            row = json.loads(line)
            found_format, found_key = row["format"], dict(row["key"])
        except (ValueError, KeyError, TypeError):
            raise self._not_a_journal(1) from None
        if found_format != FORMAT:
            raise UserError(
                f"{self.path}: found journal format {found_format}, expected {FORMAT}. Delete the file to start again."
            )
        if found_key != key:
            names = sorted(name for name in {*found_key, *key} if found_key.get(name) != key.get(name))
            found, expected = (", ".join(f"{name} {each.get(name)}" for name in names) for each in (found_key, key))
            raise UserError(
                f"{self.path}: holds answers of another model or of other settings (found {found}, expected {expected})"
                ". Delete the file to start again, or name another one."
            )

    def _not_a_journal(self, number: int) -> UserError:
        return UserError(
            f"{self.path}, line {number}: not a line of an answer journal. Delete the file, or name another one."
        )

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(_encode(row))
        self._file.flush()


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
