"""Numbers of rows that are not the expected ones are told, as far as they can be known."""

from pathlib import Path

import pytest

from preprocess import build_shards
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, write_mix, write_talk

NUM_ROWS = 240
SOURCE = {"name": "p", "format": "llava", "annotations": "rows.json"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_talk(tmp_path / "root", NUM_ROWS)


def test_a_row_count_other_than_expected_is_reported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {
        "p": ({"expected_rows": NUM_ROWS}, []),
        "more": ({"expected_rows": 700}, ["source 'more' has 240 rows, the mix expects 700"]),
        "weighted": ({"expected_rows": NUM_ROWS, "weight": 2}, []),
        "weighed wrong": (
            {"expected_rows": 9, "weight": 2},
            ["source 'weighed wrong' has 240 rows, the mix expects 9"],
        ),
        "cut short": ({"expected_rows": 700, "limit": 10}, []),
        "cut too late": (
            {"expected_rows": 9, "limit": 10},
            ["source 'cut too late' has at least 10 rows, the mix expects 9"],
        ),
        "ends early": (
            {"expected_rows": 700, "limit": 4000},
            [
                "source 'ends early' has 240 rows, fewer than its limit of 4000",
                "source 'ends early' has 240 rows, the mix expects 700",
            ],
        ),
    }
    write_mix(root, [SOURCE | {"name": name} | about for name, (about, _) in notes.items()])
    assert build_shards.main([*arguments(root, tmp_path / "out", gpt_neox()), "--check"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert told == [f"note: {note}" for _, lines in notes.values() for note in lines]


def test_rows_that_sources_have_together_may_be_expected(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, told in ((480, False), (481, True)):
        mix = write_mix(root, [SOURCE, SOURCE | {"name": "q"}])
        mix.write_text(mix.read_text() + f'[[expected]]\nsources = ["p", "q"]\nrows = {rows}\n')
        assert build_shards.main([*arguments(root, tmp_path / "out", gpt_neox()), "--check"]) == 0
        note = "note: sources p, q together have 480 rows, the mix expects 481"
        assert (note in capsys.readouterr().out) == told
