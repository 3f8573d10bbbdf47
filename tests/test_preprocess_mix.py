"""Mixes are strict, sources read their formats, and the paper's mix is the one that is documented."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from preprocess.annotations.dialogue import to_dialogue
from preprocess.annotations.mix import Mix, Source, load_mix

PAPER = Path(__file__).parents[1] / "preprocess/mixes/emma_1m2.toml"
SOURCE = '[[source]]\nname = "a"\nformat = "llava"\nannotations = "a.json"\n'

MISTAKES = {
    "no TOML": ("source = [", "is not TOML"),
    "one table for a list": (
        SOURCE.replace("[[source]]", "[source]"),
        "[source] is one table, expected a list of them: write [[source]]",
    ),
    "number for tables": ("source = 3", "source is 3, expected tables: write each under [[source]]"),
    "numbers for tables": (
        "expected = [3]\n" + SOURCE,
        "expected is [3], expected tables: write each under [[expected]]",
    ),
    "number for an archive": (SOURCE + "[archives]\nx = 3", "[archives]: x is 3, expected str"),
    "number for a name": (SOURCE + "[[expected]]\nsources = [[3]]\nrows = 1", "there is no source [3]; there are a"),
    "unlike any key": (SOURCE + "zzz = 1", "[[source]] 1 has an unknown key 'zzz'; known: annotations, "),
    "no source": ('tokenizer = "x"', "names no source"),
    "unknown key": ("tokeniser = 'x'\n" + SOURCE, "unknown key 'tokeniser'; did you mean 'tokenizer'?"),
    "unknown key of a source": (
        SOURCE + "imags = ''",
        "[[source]] 1 has an unknown key 'imags'; did you mean 'images'?",
    ),
    "missing key": ('[[source]]\nname = "a"', "[[source]] 1 has no 'format'"),
    "unknown format": (SOURCE.replace("llava", "lava"), "format is 'lava', expected one of llava, lvis, lrv"),
    "wrong type": (SOURCE + "expected_rows = 'many'", "expected_rows is 'many', expected int"),
    "twins": (SOURCE + SOURCE, "two sources named 'a'"),
    "impossible limit": (SOURCE + "limit = 0", "limit is 0"),
    "impossible weight": (SOURCE + "weight = 0.0", "weight is 0.0; it must be above 0"),
    "weight of a wrong type": (SOURCE + "weight = '2'", "weight is '2', expected int or float"),
    "expected of nobody": (
        SOURCE + "[[expected]]\nsources = ['b']\nrows = 1",
        "1: there is no source 'b'; there are a",
    ),
    "expected without rows": (SOURCE + "[[expected]]\nsources = ['a']", "[[expected]] 1 has no 'rows'"),
    "unknown encoding": (SOURCE + '[images]\nencoding = "gif"', "images.encoding is 'gif'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_mix_is_one_clear_line(tmp_path: Path, mistake: str) -> None:
    text, complaint = MISTAKES[mistake]
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_mix(tmp_path / "mix.toml")
    assert str(raised.value).startswith(str(tmp_path / "mix.toml"))
    assert complaint in str(raised.value)


def test_a_mix_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no mix .*nowhere\.toml"):
        load_mix(tmp_path / "nowhere.toml")


def test_a_folder_is_no_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mix .* cannot be read \(Is a directory\); give a TOML file"):
        load_mix(tmp_path)


def test_a_whole_mix_is_read(tmp_path: Path) -> None:
    head = 'tokenizer = "org/name"\n[images]\nencoding = "raw"\n[archives]\n"vg/VG_100K" = "vg/images.zip"\n'
    (tmp_path / "mix.toml").write_text(head + SOURCE + 'images = "p"\nlimit = 3\n')
    source = Source("a", "llava", "a.json", "p", None, 3)
    assert load_mix(tmp_path / "mix.toml") == Mix((source,), (), "raw", "org/name", {"vg/VG_100K": "vg/images.zip"})


@pytest.mark.parametrize(("weight", "taken"), [(1, "abcde"), (3, "aaabbbcccdddeee"), (0.5, "bd"), (1.5, "abbcdde")])
def test_a_weight_repeats_rows_or_thins_them_evenly(weight: float, taken: str) -> None:
    source = Source("a", "llava", "a.json", weight=weight)
    assert "".join(row * source.times(number) for number, row in enumerate("abcde")) == taken


def test_the_papers_mix_has_its_three_sources_in_five_files() -> None:
    mix = load_mix(PAPER)
    assert [source.format for source in mix.sources] == ["llava", "lvis", "lrv", "lrv", "lrv"]
    assert mix.encoding == "jpeg"


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "number for a picture": (
        {"image_id": 2325435, "question": "Q", "answer": "A", "task": "x"},
        "lrv/lrv-vg/2325435.jpg",
    ),
    "text for a picture": ({"image_id": "17", "question": "Q", "answer": "A"}, "lrv/lrv-vg/17.jpg"),
    "file name of a chart": ({"image_id": "c_1.png", "question": "Q", "answer": "A"}, "lrv/lrv-vg/c_1.png"),
    "number that is an answer": ({"image_id": "17", "question": "Q", "answer": 3.5}, "lrv/lrv-vg/17.jpg"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_lrv_is_one_question_with_its_answer(kind: str) -> None:
    row, picture = ROWS[kind]
    dialogue = to_dialogue(
        json.loads(json.dumps(row)), source="lrv", row=5, row_format="lrv", image_folder="lrv/lrv-vg"
    )
    assert dialogue.image == picture
    assert [(turn.speaker, turn.text) for turn in dialogue.turns] == [("human", "Q"), ("gpt", str(row["answer"]))]
    assert (dialogue.source, dialogue.row, dialogue.id) == ("lrv", 5, str(row["image_id"]))


def test_a_row_without_id_is_named_by_its_place() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    dialogue = to_dialogue({"conversations": turns}, source="talk", row=41, row_format="llava", image_folder="")
    assert dialogue.id == "talk-41"
