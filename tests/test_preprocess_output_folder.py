"""The output folder of a build: foreign files, leftovers of earlier builds, and the lock."""

import shutil
import uuid
from pathlib import Path

import pytest

from model.errors import ExitCode
from preprocess import build_shards
from preprocess.builder import output_folder
from preprocess.builder.output_folder import build_lock
from preprocess.shards.folder import ShardFolder
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, build_in_process, exit_code_of, write_talk


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk"), 40)


@pytest.fixture(scope="module")
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_in_process(root, tmp_path_factory.mktemp("expected") / "set", gpt_neox(), samples_per_shard=10)


def command(root: Path, out: Path) -> list[str]:
    return arguments(root, out, gpt_neox(), workers=0, samples_per_shard=10)


@pytest.mark.parametrize("name", ["shard-000123.tar", "shard-notes.json", "tokenizer.json"])
@pytest.mark.parametrize("words", [["--check"], []])
def test_building_into_a_folder_with_foreign_files_is_a_user_error(
    root: Path, tmp_path: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert exit_code_of(build_shards.main, [*command(root, out), *words]) == ExitCode.USER_ERROR
    assert f"--out {out} holds {name} but neither manifest.json nor .work" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]


def test_a_build_removes_leftovers_of_earlier_builds_and_no_other_file(
    root: Path, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    theirs = ["shard-000123.tar", "shard-notes.json", "mine.tmp", "mine.feed.tmp"]
    ours = [
        "shard-00099.tar",
        "shard-123456.json",
        f"shard-00000.tar.{uuid.uuid4().hex}.tmp",
        ".work/shard-00000.crumb.tmp",
    ]
    for name in theirs + ours:
        (out / name).write_text("mine")
    (out / "manifest.json").unlink()
    assert build_shards.main(command(root, out)) == 0
    assert {path.name for path in out.iterdir()} - {path.name for path in expected.iterdir()} == set(theirs)
    assert [path.name for path in (out / ".work").iterdir()] == ["lock"]


def test_remove_manifest_syncs_the_folder_after_the_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    synced = []
    monkeypatch.setattr(output_folder, "sync_folder", lambda path: synced.append((path, list(path.iterdir()))))
    output_folder.remove_manifest(ShardFolder(tmp_path))
    assert synced == [(tmp_path, [])]


def test_a_second_simultaneous_build_into_the_same_folder_is_a_user_error(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with build_lock(ShardFolder(tmp_path / "out")):
        assert exit_code_of(build_shards.main, command(root, tmp_path / "out")) == ExitCode.USER_ERROR
    assert "another build_shards.py is building into" in capsys.readouterr().err
