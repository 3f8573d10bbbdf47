"""Compatibility with shard sets of version 0.1, and reruns of a build by the same version of the builder."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preprocess import build_shards
from preprocess.builder import plan
from preprocess.rejects import Rejected
from preprocess.shards.verify import verify
from tests.support.launch import REPOSITORY

V0_1 = REPOSITORY / "tests/fixtures/v0_1"
COMMAND = shlex.split(  # the command in V0_1 / README.md
    "raw/mix.toml --model tiny_v2 --root raw --out shards --tokenizer raw/tokenizer "
    "--samples-per-shard 8 --workers 0 --max-reject-ratio 0.2"
)


@pytest.fixture
def built_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the old shard set and its raw data into a new working directory. Return the folder of the set."""
    for name in ("raw", "shards"):
        shutil.copytree(V0_1 / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards"


@pytest.fixture
def _same_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the builder the version that built the old set."""
    monkeypatch.setattr(plan, "BUILDER", 4)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def write_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def reword_every_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a later version that words the details of all rejects differently."""
    init = Rejected.__init__

    def reworded(self: Rejected, reason: str, detail: str = "") -> None:
        init(self, reason, f"in other words: {detail}")

    monkeypatch.setattr(Rejected, "__init__", reworded)


def test_rerunning_the_build_command_replaces_an_old_set_and_says_so(built_before: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "preprocess/build_shards.py"), *COMMAND]
    checked = subprocess.run([*program, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert hashes(built_before) == hashes(V0_1 / "shards")
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    note = f"note: 2 of 2 shards in {built_before} were built by an earlier version, and a build replaces them"
    assert note in checked.stdout
    assert note in done.stdout
    assert f"{built_before} is built: 14 samples in 2 shards, 2 of 16 rows rejected" in done.stdout
    assert list(verify(built_before)) == []
    tars = [name for name in hashes(built_before) if name.endswith(".tar")]
    assert [hashes(built_before)[tar] for tar in tars] == [hashes(V0_1 / "shards")[tar] for tar in tars]
    again = subprocess.run(program, capture_output=True, text=True, check=False)
    assert "is up to date" in again.stdout
    assert "note: " not in again.stdout


@pytest.mark.usefixtures("_same_builder")
def test_rerunning_the_build_command_leaves_a_finished_set_byte_identical(
    built_before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_times(built_before)
    assert build_shards.main(COMMAND) == 0
    output = capsys.readouterr().out
    assert f"{built_before} is up to date: 14 samples in 2 shards, 2 of 16 rows rejected" in output
    assert hashes(built_before) == hashes(V0_1 / "shards")
    assert write_times(built_before) == before, "files were written again"


@pytest.mark.usefixtures("_same_builder")
def test_a_set_is_up_to_date_although_the_wording_of_rejects_has_changed(
    built_before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reword_every_reject(monkeypatch)
    assert build_shards.main(COMMAND) == 0
    assert "is up to date" in capsys.readouterr().out
    assert hashes(built_before) == hashes(V0_1 / "shards")


@pytest.mark.usefixtures("_same_builder")
def test_a_rebuilt_reject_list_has_the_new_wording_for_early_rejects_only(
    built_before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reword_every_reject(monkeypatch)
    (built_before / "rejects.jsonl").unlink()
    assert build_shards.main(COMMAND) == 0
    details = [json.loads(line)["detail"] for line in (built_before / "rejects.jsonl").read_text().splitlines()]
    assert details == ["images/gone.png", "in other words: conversations is []"], (
        "reused shards must keep the old wording of their rejects"
    )
    built = hashes(built_before)
    assert build_shards.main(COMMAND) == 0
    output = capsys.readouterr().out
    assert output.count("is built") == output.count("is up to date") == 1
    assert hashes(built_before) == built
    assert list(verify(built_before)) == []


CHANGES: dict[str, Any] = {
    "a reject fewer": lambda rows: rows[11] | {"conversations": rows[0]["conversations"]},
    "another reason": lambda rows: {"id": "mute"},
    "another id": lambda rows: rows[11] | {"id": "other"},
}


@pytest.mark.usefixtures("_same_builder")
@pytest.mark.parametrize("change", CHANGES)
def test_a_set_is_rebuilt_if_a_rejected_row_changes(
    built_before: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = built_before.parent / "raw/dialogues.json"
    rows = json.loads(path.read_text())
    rows[11] = CHANGES[change](rows)
    path.write_text(json.dumps(rows))
    assert build_shards.main(COMMAND) == 0
    assert "is built" in capsys.readouterr().out
    assert hashes(built_before)["manifest.json"] != hashes(V0_1 / "shards")["manifest.json"]
    assert list(verify(built_before)) == []


@pytest.mark.usefixtures("_same_builder")
def test_a_set_is_rebuilt_if_another_row_is_rejected(
    built_before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All shards can be reused, so only the hash of the rejects in the manifest reveals the change."""
    path = built_before.parent / "raw/dialogues.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), {"id": "new"}]))
    assert build_shards.main(COMMAND) == 0
    assert "is built: 14 samples in 2 shards, 3 of 17 rows rejected" in capsys.readouterr().out
