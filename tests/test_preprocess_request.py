"""Arguments and inputs of a build: user errors are reported in one line before any shard is built."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import ExitCode
from preprocess import build_shards
from preprocess.annotations import worklist
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, dialogue_row, exit_code_of, write_mix, write_talk


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk"), 10)


def command(root: Path, out: Path) -> list[str]:
    return arguments(root, out, gpt_neox(), workers=0)


def test_relative_paths_in_a_ray_job_with_an_uploaded_checkout_are_a_user_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ray unpacks an uploaded checkout into such a folder.
    copy = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mix, *words = command(root, tmp_path / "out")
    for relative, where in (
        ([mix, *words, "--root", "data/raw"], "--root data/raw is relative"),
        (["data/mix.toml", *words], "data/mix.toml is relative"),
        ([mix, *words, "--tokenizer", "data/tokenizer"], "If data/tokenizer is a folder: it is relative"),
        ([mix, *words, "--tokenizer", "./tokenizer.json"], "If ./tokenizer.json is a folder: it is relative"),
    ):
        assert exit_code_of(build_shards.main, relative) == ExitCode.USER_ERROR
        output = capsys.readouterr().err
        assert f"{where}, but this job runs in a temporary copy" in output
        assert output.endswith("Give an absolute path\n")


MISTAKES = {
    "no root": (["--root", "/nowhere"], "--root /nowhere is not a folder"),
    "no tokenizer": (["--tokenizer", "/nowhere"], "there is no tokenizer /nowhere"),
    "unknown preset": (["--model", "emma_v3"], "no model preset 'emma_v3', did you mean 'emma_v2'; presets: emma_v1"),
    "large vocabulary": (["--model", "tiny_v2"], "has ids up to 50276, but preset tiny_v2 has 1024 token embeddings"),
    "check and compare": (
        ["--check", "--compare-images"],
        "--check does not compare images: leave out --check or --compare-images",
    ),
    "impossible ratio": (["--max-reject-ratio", "7"], "--max-reject-ratio is 7.0, expected a number from 0 to 1"),
    "out is read-only": (["--out", "/sys/shards"], "/sys/shards: "),
    "out is a file": (
        ["--out", __file__],
        f"{__file__}/.work: Not a directory; check the path, then run the same command again",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_are_reported_in_one_line_and_create_no_folder(
    mistake: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, complaint = MISTAKES[mistake]
    assert exit_code_of(build_shards.main, [*command(root, tmp_path / "out"), *words]) == ExitCode.USER_ERROR
    output = capsys.readouterr().err
    assert complaint in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_image_folder_is_reported_before_any_shard_is_built(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dialogue_row(i) | {"image": f"coco/train2017/{i}.jpg"} for i in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_mix(tmp_path, [{"name": "llava", "format": "llava", "annotations": "rows.json"}])
    assert exit_code_of(build_shards.main, command(tmp_path, tmp_path / "out")) == ExitCode.USER_ERROR
    output = capsys.readouterr().err
    assert f"image folders are missing under {tmp_path}: coco/train2017 (9 rows)" in output
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_mix_whose_sources_have_no_rows_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text("[]")
    write_mix(tmp_path, [{"name": "none", "format": "llava", "annotations": "rows.json"}])
    assert exit_code_of(build_shards.main, command(tmp_path, tmp_path / "out")) == ExitCode.USER_ERROR
    assert "have no rows: there is nothing to build" in capsys.readouterr().err


def test_a_check_reports_missing_read_permission_in_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(path: Path) -> Iterator[Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(worklist, "read_rows", closed)
    assert exit_code_of(build_shards.main, [*command(root, tmp_path / "out"), "--check"]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err == (
        f"error: {root / 'rows.json'}: Permission denied; ask its owner for permission, or choose another path, "
        "then run the same command again: finished shards are kept\n"
    )


@pytest.mark.parametrize("words", [["--check"], []])
def test_one_error_names_every_missing_annotation_file_and_image_folder(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"name": name, "format": "llava", "annotations": f"{name}.json"} for name in ("a", "b", "c")]
    (tmp_path / "b.json").write_text("[]")
    write_mix(tmp_path, [*sources[:2], sources[2] | {"images": "p"}])
    assert exit_code_of(build_shards.main, [*command(tmp_path, tmp_path / "out"), *words]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err == (
        f"error: source 'a': annotation file {tmp_path}/a.json is missing; "
        f"source 'c': annotation file {tmp_path}/c.json is missing; "
        f"source 'c': image folder {tmp_path}/p is missing; "
        "put the missing files there, or correct the mix or --root\n"
    )
