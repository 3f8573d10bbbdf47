"""Raw data of the demo: scenes and answers, dataset formats, held-out images, damaged rows, and the tokenizer."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from model.errors import ExitCode, UserError
from model.presets import preset
from preprocess import build_shards
from preprocess.demo.damaged_rows import DAMAGED, REPAIRABLE
from preprocess.demo.mix import HELD_OUT, MODEL, QUESTIONS, TOKENIZER, Sizes, write_mix
from preprocess.demo.scenes import (
    CELL_PX,
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    WORDS,
    Scene,
    cell_centre,
    draw_scenes,
    questions,
    render,
)
from preprocess.demo.writing import photograph_dialogues
from preprocess.images.codec import decode_rgb
from preprocess.prompts import Tokenizer, load_tokenizer
from tests.support.launch import run_python

MIX = Path(__file__).parents[1] / "preprocess" / "mixes" / "demo.toml"
SIZES = Sizes(llava=40, lvis=20, lrv=10, held_out=30, text_only=20)
SCENES = list(itertools.islice(draw_scenes("test"), 200))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix") / "raw"
    write_mix(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "demo"
    words = [MIX, "--model", MODEL, "--root", root, "--out", out, "--tokenizer", root / TOKENIZER, "--workers", 0]
    assert build_shards.main([*map(str, words), "--max-reject-ratio", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / TOKENIZER)


def rows_of(root: Path, source: str) -> list[dict]:
    return json.loads((root / f"{source}.json").read_text())


def held_out(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / HELD_OUT / QUESTIONS).read_text().splitlines()]


def red_scene(**options: Any) -> Scene:
    return Scene(background=(168, 168, 168), colour="red", paint=COLOURS["red"], jitter=(0, 0), **options)


def answers(scene: Scene) -> dict[str, str]:
    return {question.kind: question.answer for question in questions(scene)}


def painted(scene: Scene) -> np.ndarray:
    """Return a boolean mask [height, width] of the pixels that have the colour of the scene."""
    return (np.asarray(render(scene)) == scene.paint).all(-1)


def share_painted(scene: Scene, row: int, column: int) -> float:
    """Return the share of the pixels in a grid cell that have the colour of the scene."""
    x, y = map(round, cell_centre(scene, (row, column)))
    half = CELL_PX // 2
    return float(painted(scene)[y - half : y + half, x - half : x + half].mean())


# -- Scenes ------------------------------------------------------------------------------------------------------------


def test_each_demo_scene_is_painted_in_the_colour_that_its_answer_names() -> None:
    for scene in SCENES:
        named = min(COLOURS, key=lambda name: np.abs(np.subtract(COLOURS[name], scene.paint)).sum())
        assert answers(scene)["colour"] == named
        assert painted(scene).sum() > 300


def test_painted_shapes_stay_inside_their_grid_cells() -> None:
    for scene in (scene for scene in SCENES if scene.cells):
        filled = {(row, column) for row in range(3) for column in range(3) if share_painted(scene, row, column) > 0.1}
        assert filled == set(scene.cells)
        whole = painted(scene).sum()
        assert whole == pytest.approx(sum(share_painted(scene, *cell) for cell in scene.cells) * CELL_PX**2, rel=0.02)


def test_count_and_position_answers_agree_with_the_scenes_grid_cells() -> None:
    for scene in (scene for scene in SCENES if scene.cells):
        answer = answers(scene)
        assert ("count" in answer, "position" in answer) == (len(scene.cells) > 1, len(scene.cells) == 1)
        if len(scene.cells) > 1:
            assert answer["count"] == COUNTS[len(scene.cells)]
        else:
            (row, column), place = scene.cells[0], answer["position"]
            assert place == POSITIONS[row][column]
            assert ("top" in place, "bottom" in place) == (row == 0, row == 2)
            assert ("left" in place, "right" in place) == (column == 0, column == 2)


def test_every_shape_is_rendered_differently() -> None:
    images = [render(red_scene(shape=shape, radius=24, cells=((1, 1),))).tobytes() for shape in SHAPES]
    assert len(set(images)) == len(SHAPES)


def test_a_printed_word_fits_into_the_image() -> None:
    for word in WORDS:
        ink = painted(red_scene(word=word))
        assert ink.sum() > 2000
        assert not ink[[0, -1]].any()
        assert not ink[:, [0, -1]].any()


def test_no_constant_answer_is_right_for_a_third_of_the_questions_of_a_kind() -> None:
    asked = [question for scene in itertools.islice(draw_scenes("balance"), 2000) for question in questions(scene)]
    for kind in {question.kind for question in asked}:
        counts = Counter(question.answer for question in asked if question.kind == kind)
        assert counts.most_common(1)[0][1] / counts.total() < 0.32


def test_scenes_of_a_series_are_reproducible_and_differ_from_other_series() -> None:
    assert list(itertools.islice(draw_scenes("test"), 5)) == SCENES[:5]
    assert list(itertools.islice(draw_scenes("other"), 5)) != SCENES[:5]


# -- The mix -----------------------------------------------------------------------------------------------------------


def test_writing_the_demo_mix_twice_gives_identical_files(root: Path, tmp_path: Path) -> None:
    write_mix(tmp_path / "raw", SIZES)
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "raw"): path.read_bytes()
        for path in (tmp_path / "raw").rglob("*")
        if path.is_file()
    }


def test_writing_the_demo_mix_into_a_nonempty_folder_is_a_user_error(root: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        write_mix(root, SIZES)


def test_the_demo_command_reports_a_nonempty_folder_in_one_line(root: Path) -> None:
    command = run_python("-m", "preprocess.demo", root)
    assert command.returncode == ExitCode.USER_ERROR
    assert command.stderr == f"error: {root} is not empty. Give another folder, or remove its contents\n"


def test_no_training_image_equals_a_held_out_image(root: Path) -> None:
    images = [path for path in root.rglob("*.jpg") if "damaged" not in path.parts]
    pixels = {path: decode_rgb(path.read_bytes()).tobytes() for path in images}
    unseen = {data for path, data in pixels.items() if HELD_OUT in path.parts}
    seen = {data for path, data in pixels.items() if HELD_OUT not in path.parts}
    assert len(unseen) == SIZES.held_out
    assert unseen.isdisjoint(seen)
    named = [row.get("image", row.get("image_id")) for source in DAMAGED for row in rows_of(root, source)]
    assert not any(HELD_OUT in str(name) for name in named)


def test_held_out_questions_cover_every_kind_and_every_held_out_image(root: Path) -> None:
    questions = held_out(root)
    assert {question["kind"] for question in questions} == {"colour", "shape", "count", "position", "word"}
    assert {question["image"] for question in questions} == {path.name for path in (root / HELD_OUT).glob("*.jpg")}


def test_demo_rows_have_the_formats_of_the_real_datasets(root: Path) -> None:
    llava, lvis, lrv = (rows_of(root, source) for source in ("llava", "lvis", "lrv"))
    text_only = [row for row in llava if row.get("model") == ""]
    assert len(text_only) == SIZES.text_only
    assert not any("image" in row for row in text_only)
    firsts = [row["conversations"][0]["value"] for row in lvis if row["image"].startswith("scenes")]
    assert len(firsts) == SIZES.lvis
    assert all(first.endswith("\n<image>") for first in firsts)
    assert {frozenset(row) for row in lrv} >= {frozenset(("image_id", "question", "answer", "task"))}
    assert max(Counter(row["image_id"] for row in lrv).values()) > 1
    assert any(len(row["conversations"]) > 4 for row in llava)


def test_every_photograph_with_a_dialogue_can_be_decoded(root: Path) -> None:
    for name in photograph_dialogues():
        assert min(decode_rgb((root / "photographs" / name).read_bytes()).shape[:2]) > 100


# -- Through the builder -----------------------------------------------------------------------------------------------


def test_every_damaged_demo_row_is_rejected_with_its_reason(shards: Path) -> None:
    found = [json.loads(line) for line in (shards / "rejects.jsonl").read_text().splitlines()]
    expected = Counter((source, reason) for source, rows in DAMAGED.items() for reason, _ in rows)
    assert expected.total() == 12
    assert Counter((reject["source"], reject["reason"]) for reject in found) == expected


def test_all_undamaged_and_repairable_demo_rows_become_samples(root: Path, shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    rows = sum(len(rows_of(root, source)) for source in DAMAGED)
    assert manifest["counts"]["samples"] == rows - 12
    assert sum(map(len, REPAIRABLE.values())) >= 4


def test_less_than_one_percent_of_each_full_size_demo_source_is_damaged() -> None:
    sizes = Sizes()
    rows = {"llava": sizes.llava + sizes.text_only, "lvis": sizes.lvis, "lrv": 2 * sizes.lrv}
    for source, damaged in DAMAGED.items():
        assert len(damaged) / rows[source] < 0.01


# -- Tokenizer ---------------------------------------------------------------------------------------------------------


def test_the_demo_tokenizer_fits_the_model_and_has_the_ids_of_gpt_neox(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size <= preset(MODEL).llm.vocab_size
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([0, 1], skip_special_tokens=False) == "<|endoftext|><|padding|>"


def test_decoding_encoded_text_restores_the_text(tokenizer: Tokenizer) -> None:
    for text in ("In: Which shape is it?\nOut: ", "Größe 5 µm – 汉字 🙂", "a\r\n\tb", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_short_demo_answers_have_one_or_two_tokens(tokenizer: Tokenizer) -> None:
    places = [place for row in POSITIONS for place in row]
    for answer in (*COLOURS, *COUNTS.values(), *places):
        assert len(tokenizer.encode(answer)) <= 2, answer


def test_transformers_loads_the_demo_tokenizer_and_encodes_equally(root: Path, tokenizer: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(root / TOKENIZER)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert theirs("Where is it?")["input_ids"] == tokenizer.encode("Where is it?")
