"""Notes about sources whose number of rows differs from the number in the mix."""

import json
from pathlib import Path

import pytest

from preprocess import build_shards
from tests.support.dirty_rows import conversation
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, talk_row, write_mix, write_talk

NUM_ROWS = 240
SOURCE = {"name": "p", "format": "llava", "annotations": "rows.json"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_talk(tmp_path / "root", NUM_ROWS)


def test_a_note_reports_each_source_whose_row_count_differs_from_the_mix(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {
        "p": ({"expected_rows": NUM_ROWS}, []),
        "more": ({"expected_rows": 700}, ["source 'more' has 240 rows, the mix expects 700"]),
        "weighted": ({"expected_rows": NUM_ROWS, "weight": 2}, []),
        "weighted and wrong": (
            {"expected_rows": 9, "weight": 2},
            ["source 'weighted and wrong' has 240 rows, the mix expects 9"],
        ),
        "limited": ({"expected_rows": 700, "limit": 10}, []),
        "limit above expectation": (
            {"expected_rows": 9, "limit": 10},
            ["source 'limit above expectation' has at least 10 rows, the mix expects 9"],
        ),
        "fewer than limit": (
            {"expected_rows": 700, "limit": 4000},
            [
                "source 'fewer than limit' has 240 rows, fewer than its limit of 4000",
                "source 'fewer than limit' has 240 rows, the mix expects 700",
            ],
        ),
    }
    write_mix(root, [SOURCE | {"name": name} | options for name, (options, _) in notes.items()])
    assert build_shards.main([*arguments(root, tmp_path / "out", gpt_neox()), "--check"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert printed == [f"note: {note}" for _, lines in notes.values() for note in lines]


def test_a_note_counts_text_only_rows_that_may_refer_to_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        "plain",
        "the <video> tag",
        "a[image]",
        "see ![car](car.jpg)",
        "an <image_url>",
        'write <img src="a.jpg">',
        "[IMG] or not",
    ]
    rows = [talk_row(0) | {"conversations": conversation(text, "A")} for text in [*texts[:-1], "is " + texts[-1]]]
    write_mix(tmp_path / "root", [SOURCE])
    (tmp_path / "root/rows.json").write_text(json.dumps(rows))
    for options in (["--check"], ["--workers", "0"]):
        assert build_shards.main([*arguments(tmp_path / "root", tmp_path / "out", gpt_neox()), *options]) == 0
        note = "source 'p': 5 text-only rows contain a tag such as <video>, [IMG] or <img src>; they are kept as text"
        assert f"note: {note}\n" in capsys.readouterr().out


def test_a_note_reports_a_wrong_total_row_count_of_several_sources(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, expect_note in ((480, False), (481, True)):
        mix = write_mix(root, [SOURCE, SOURCE | {"name": "q"}])
        mix.write_text(mix.read_text() + f'[[expected]]\nsources = ["p", "q"]\nrows = {rows}\n')
        assert build_shards.main([*arguments(root, tmp_path / "out", gpt_neox()), "--check"]) == 0
        note = "note: sources p, q together have 480 rows, the mix expects 481"
        assert (note in capsys.readouterr().out) == expect_note
