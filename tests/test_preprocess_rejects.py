"""The limit on the share of rejected rows, and the reject list of a build."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from model.errors import ExitCode
from preprocess import build_shards
from preprocess.annotations.mix import load_mix
from preprocess.annotations.worklist import make_worklist
from preprocess.atomic import published
from preprocess.rejects import count_rejects
from preprocess.shards.manifest import Manifest
from preprocess.shards.verify import verify
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import run_python
from tests.support.shard_builds import (
    arguments,
    build_in_process,
    contents,
    exit_code_of,
    talk_row,
    write_mix,
    write_talk,
)

SCRIPT = "preprocess/build_shards.py"


def command(root: Path, out: Path, **options: Any) -> list[str]:
    return arguments(root, out, gpt_neox(), **options)


def test_a_note_reports_each_source_that_contributes_no_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talk(tmp_path / "root", 240)
    (tmp_path / "root/none.json").write_text("[]")
    source = {"name": "p", "format": "llava", "annotations": "rows.json"}
    none = {"name": "none", "format": "llava", "annotations": "none.json"}
    write_mix(tmp_path / "root", [none, source, source | {"name": "thinned away", "weight": 0.001}])
    for state in ("is built", "is up to date"):
        out = build_in_process(tmp_path / "root", tmp_path / "out", gpt_neox())
        output = capsys.readouterr().out
        assert state in output
        assert "note: source 'none' has no rows, so it adds nothing\n" in output
        assert "note: source 'thinned away' adds nothing: weight 0.001 leaves none of its 240 rows\n" in output
    assert Manifest.load(out).sources["none"] == {"rows": 0, "samples": 0, "rejects": 0}
    assert list(verify(out)) == []


@pytest.fixture
def half_bad(tmp_path: Path) -> Path:
    """Return a data root with a valid source and a source of which 5 of 10 rows are rejected before images are read."""
    folder, good = tmp_path / "half_bad", [talk_row(number) for number in range(10)]
    folder.mkdir()
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "bad.json").write_text(json.dumps([*good[:5], {}, {}, {}, {}, 7]))
    sources = [{"name": name, "format": "llava", "annotations": f"{name}.json"} for name in ("good", "bad")]
    write_mix(folder, sources)
    return folder


HALF_BAD = ["  rejected       4  bad: missing_key", "  rejected       1  bad: not_an_object"]
TOO_MANY = "error: more rows were rejected than --max-reject-ratio 0.01 allows: bad 50.00% (5 of 10 rows); "


def test_too_many_rejects_before_any_image_is_read_fail_the_build_at_once(
    half_bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert exit_code_of(build_shards.main, command(half_bad, out, workers=0)) == ExitCode.FAILED
    output = capsys.readouterr()
    assert output.out.splitlines() == HALF_BAD
    assert output.err.startswith(f"{TOO_MANY}{out / 'rejects.jsonl'} lists them with their reasons; ")
    assert [json.loads(line)["row"] for line in (out / "rejects.jsonl").read_text().splitlines()] == [5, 6, 7, 8, 9]
    assert not list(out.glob("shard-*"))


def test_a_check_fails_on_too_many_rejects_as_a_build_does(
    half_bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command(half_bad, tmp_path / "out"), "--check"]
    assert exit_code_of(build_shards.main, words) == ExitCode.FAILED
    output = capsys.readouterr()
    assert output.out.splitlines()[-2:] == HALF_BAD
    assert output.err.startswith(TOO_MANY)
    assert not (tmp_path / "out").exists()
    assert build_shards.main([*words, "--max-reject-ratio", "0.5"]) == 0


def test_progress_counts_rejects_of_unread_rows_and_of_reused_shards(half_bad: Path, tmp_path: Path) -> None:
    rows = json.loads((half_bad / "good.json").read_text())
    (half_bad / "good.json").write_text(json.dumps([rows[0] | {"image": "lost.jpg"}, *rows[1:]]))
    words = arguments(half_bad, tmp_path / "out", gpt_neox(), samples_per_shard=5, workers=0, max_reject_ratio=1)
    assert "0/15 dialogues (0%)  0.0/s  5 rejected" in run_python(SCRIPT, *words).stdout
    (tmp_path / "out/shard-00001.tar").unlink()
    assert "10/15 dialogues (67%)  0.0/s  6 rejected" in run_python(SCRIPT, *words).stdout


def test_a_lower_reject_limit_unpublishes_a_set_until_the_limit_is_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_talk(tmp_path / "root", 10), tmp_path / "out"
    (root / "rows.json").write_text(json.dumps([talk_row(0) | {"image": "lost.jpg"}, *map(talk_row, range(1, 10))]))
    build_in_process(root, out, gpt_neox(), max_reject_ratio=0.1)
    first, shards = contents(out), {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    for _ in range(2):
        assert exit_code_of(build_shards.main, command(root, out, workers=0)) == ExitCode.FAILED
        output = capsys.readouterr()
        assert "  rejected       1  talk: picture_missing\n" in output.out
        assert f"talk 10.00% (1 of 10 rows); {out / 'rejects.jsonl'} lists them with their reasons" in output.err
        assert not (out / "manifest.json").exists()
    build_in_process(root, out, gpt_neox(), max_reject_ratio=0.1)
    assert contents(out) == first
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "built again"


def test_reject_entries_are_written_to_disk_and_not_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 20_000)
    mix = load_mix(write_mix(tmp_path, [{"name": "bad", "format": "llava", "annotations": "rows.jsonl"}]))
    tracemalloc.start()
    try:
        with published(tmp_path / "rejects.jsonl") as file:
            work = make_worklist(
                mix,
                tmp_path,
                samples_per_shard=10,
                write=lambda line: None,
                on_rows=lambda rows: None,
                write_reject=file.write,
            )
        assert tracemalloc.get_traced_memory()[1] < 8e6, (
            "rejects must not add to the megabyte of text that is read at a time"
        )
    finally:
        tracemalloc.stop()
    assert work.rejects == {("bad", "missing_key"): 20_000}
    assert count_rejects(tmp_path / "rejects.jsonl") == work.rejects
