"""Journal of answers: a JSONL file that keeps every computed answer, so that the same command resumes after a kill.

A line with a key starts a section. The key holds everything that an answer depends on, besides its question. The lines
after it hold answers:

    {"format": 1, "key": {"weights_sha256": "…", "max_new_tokens": 64}}
    {"id": "…", "answer": "a red car"}

A process reads only the sections with its own key. Therefore answers of different models or settings are never mixed,
although they can be in one file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from model.errors import UserError
from model.weights import weights_sha256
from pipeline.inference.engine import InferenceEngine

FORMAT = 1


class Journal:
    """Answers with one key, by the id of their question. Each answer is written to the file as soon as it is added.

    A line that a killed process left incomplete at the end of the file is dropped. Only one process at a time can
    open a journal.

    Attributes:
        answers: Answers by question id.

    Args:
        path: JSONL file, which is created if it does not exist. Its folder must exist.
        key: Values that the answers depend on, such as the sha256 of the weights and the generation settings.

    Raises:
        UserError: If the file is not a journal, or if another process uses it.
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
        """Read the answers of this key, and drop an incomplete last line. Start a section if the last has another key.

        The first line decides whether the file is a journal, so that no other file is changed.
        """
        header = {"format": FORMAT, "key": key}
        self._file.seek(0)
        lines = self._file.readlines()
        section = None
        for number, line in enumerate(lines, 1):
            row = _parse(line)
            if row is None and number == len(lines) and (number > 1 or _encode(header).startswith(line)):
                self._file.truncate(sum(map(len, lines[:-1])))
            elif row is None or (number == 1 and "key" not in row):
                raise UserError(
                    f"{self.path}, line {number}: not a line of an answer journal. Delete it, or name another file."
                )
            elif "key" in row:
                section = row
            elif section == header:
                self.answers[row["id"]] = row["answer"]
        if section != header:
            self._append(header)

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(_encode(row))
        self._file.flush()


def answer_key(
    model_folder: str | Path, engine: InferenceEngine, max_new_tokens: int, stop: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a journal's key for the answers of an engine: the model's hashes, and everything that selects tokens."""
    return {
        "weights_sha256": weights_sha256(model_folder),
        "tokenizer_sha256": engine.tokenizer.sha256,
        "template": engine.model.config.template,
        "dtype": str(next(engine.model.emma.parameters()).dtype),
        "state_dtype": str(engine.state_dtype),
        **asdict(engine.sampling),
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
    }


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None if the line is incomplete or does not belong to a journal."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and row.keys() in ({"format", "key"}, {"id", "answer"})
    return row if is_row and line.endswith(b"\n") else None
