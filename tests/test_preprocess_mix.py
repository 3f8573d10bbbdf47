"""Mix files: loading and its errors, source weights, the paper's mix, and row formats."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from preprocess.annotations.dialogue import to_dialogue
from preprocess.annotations.mix import ImagesConfig, Mix, Source, load_mix

PAPER = Path(__file__).parents[1] / "preprocess/mixes/emma_1m2.toml"
SOURCE = '[[source]]\nname = "a"\nformat = "llava"\nannotations = "a.json"\n'

MISTAKES = {
    "no TOML": ("source = [", ": not valid TOML: "),
    "one table for a list": (
        SOURCE.replace("[[source]]", "[source]"),
        ": [source] is one table, expected a list of tables: write [[source]]",
    ),
    "number for tables": ("source = 3", ": source: found 3, expected tables: write each under [[source]]"),
    "numbers for tables": (
        "expected = [3]\n" + SOURCE,
        ": expected: found [3], expected tables: write each under [[expected]]",
    ),
    "number for an archive": (SOURCE + "[archives]\nx = 3", ": archives.x: found 3, expected str"),
    "number for archives": ("archives = 3\n" + SOURCE, ": archives: found 3, expected a table of keys"),
    "list for a name": (
        SOURCE + "[[expected]]\nsources = [[3]]\nrows = 1",
        "[[expected]] 1: sources: found [[3]], expected a list of str",
    ),
    "unlike any key": (
        SOURCE + "zzz = 1",
        ": [[source]] 1: unknown key 'zzz'; valid keys here: annotations, expected_rows, format, ",
    ),
    "no source": ('tokenizer = "x"', ": no source; add at least one [[source]] table"),
    "unknown key": ("tokeniser = 'x'\n" + SOURCE, ": unknown key 'tokeniser', did you mean 'tokenizer'; valid keys"),
    "unknown key of a source": (SOURCE + "imags = ''", ": [[source]] 1: unknown key 'imags', did you mean 'images'; "),
    "missing key": ('[[source]]\nname = "a"', ": [[source]] 1: format is not set; set it in this file"),
    "unknown format": (
        SOURCE.replace("llava", "lava"),
        "format: found 'lava', expected one of 'llava', 'lvis', 'lrv'",
    ),
    "wrong type": (SOURCE + "expected_rows = 'many'", "expected_rows: found 'many', expected int"),
    "twins": (SOURCE + SOURCE, ": [[source]] 1: two sources are named 'a'"),
    "impossible limit": (SOURCE + "limit = 0", "limit: found 0, expected at least 1"),
    "impossible weight": (SOURCE + "weight = 0.0", "weight: found 0.0, expected a number above 0"),
    "infinite weight": (SOURCE + "weight = inf", "weight: found inf, expected a number above 0"),
    "weight of a wrong type": (SOURCE + "weight = '2'", "weight: found '2', expected float"),
    "weight that is a truth value": (SOURCE + "weight = true", "weight: found True, expected float"),
    "expected of nobody": (
        SOURCE + "[[expected]]\nsources = ['b']\nrows = 1",
        ": [[expected]] 1: no source is named 'b'; sources: a",
    ),
    "expected without rows": (SOURCE + "[[expected]]\nsources = ['a']", "[[expected]] 1: rows is not set"),
    "unknown encoding": (SOURCE + '[images]\nencoding = "gif"', ": images.encoding: found 'gif', expected one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_for_an_invalid_mix_is_one_line_that_names_the_key(tmp_path: Path, mistake: str) -> None:
    text, complaint = MISTAKES[mistake]
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_mix(tmp_path / "mix.toml")
    assert str(raised.value).startswith(f"{tmp_path / 'mix.toml'}: ")
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_mix_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such mix; the ones that ship .* preprocess/mixes"):
        load_mix(tmp_path / "nowhere.toml")


def test_a_mix_may_begin_with_a_byte_order_mark_and_end_its_lines_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_bytes(("\ufeff" + SOURCE).replace("\n", "\r\n").encode())
    assert load_mix(path).sources == (Source(name="a", format="llava", annotations="a.json"),)


def test_the_error_for_a_mix_in_utf_16_names_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_bytes(SOURCE.encode("utf-16"))
    with pytest.raises(UserError, match=r"mix\.toml: not valid TOML: .*\(found UTF-16 text, expected UTF-8 text\)"):
        load_mix(tmp_path / "mix.toml")


def test_a_folder_given_as_a_mix_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read this mix \(Is a directory\); give a TOML file"):
        load_mix(tmp_path)


def test_load_mix_reads_every_key(tmp_path: Path) -> None:
    head = 'tokenizer = "org/name"\n[images]\nencoding = "raw"\n[archives]\n"vg/VG_100K" = "vg/images.zip"\n'
    (tmp_path / "mix.toml").write_text(head + SOURCE + 'images = "p"\nlimit = 3\n')
    assert load_mix(tmp_path / "mix.toml") == Mix(
        tokenizer="org/name",
        images=ImagesConfig(encoding="raw"),
        archives={"vg/VG_100K": "vg/images.zip"},
        sources=(Source(name="a", format="llava", annotations="a.json", images="p", limit=3),),
    )


@pytest.mark.parametrize(("weight", "taken"), [(1, "abcde"), (3, "aaabbbcccdddeee"), (0.5, "bd"), (1.5, "abbcdde")])
def test_a_source_weight_repeats_rows_or_drops_rows_evenly(weight: float, taken: str) -> None:
    source = Source(name="a", format="llava", annotations="a.json", weight=weight)
    assert "".join(row * source.times(number) for number, row in enumerate("abcde")) == taken


def test_the_papers_mix_has_three_formats_in_five_files() -> None:
    mix = load_mix(PAPER)
    assert [source.format for source in mix.sources] == ["llava", "lvis", "lrv", "lrv", "lrv"]
    assert mix.images.encoding == "jpeg"


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "number for an image": (
        {"image_id": 2325435, "question": "Q", "answer": "A", "task": "x"},
        "lrv/lrv-vg/2325435.jpg",
    ),
    "text for an image": ({"image_id": "17", "question": "Q", "answer": "A"}, "lrv/lrv-vg/17.jpg"),
    "file name of a chart": ({"image_id": "c_1.png", "question": "Q", "answer": "A"}, "lrv/lrv-vg/c_1.png"),
    "number that is an answer": ({"image_id": "17", "question": "Q", "answer": 3.5}, "lrv/lrv-vg/17.jpg"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_an_lrv_row_becomes_a_dialogue_of_one_question_and_answer(kind: str) -> None:
    row, image = ROWS[kind]
    dialogue = to_dialogue(
        json.loads(json.dumps(row)), source="lrv", row=5, row_format="lrv", image_folder="lrv/lrv-vg"
    )
    assert dialogue.image == image
    assert [(turn.speaker, turn.text) for turn in dialogue.turns] == [("human", "Q"), ("gpt", str(row["answer"]))]
    assert (dialogue.source, dialogue.row, dialogue.id) == ("lrv", 5, str(row["image_id"]))


def test_a_row_without_an_id_gets_an_id_from_its_source_and_row_number() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    dialogue = to_dialogue({"conversations": turns}, source="talk", row=41, row_format="llava", image_folder="")
    assert dialogue.id == "talk-41"
