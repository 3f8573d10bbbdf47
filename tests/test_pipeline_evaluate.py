"""Exact-match evaluation: question files, scores, the two control conditions, and the command."""

import gzip
import json
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.emma import Emma
from model.errors import UserError
from model.presets import preset
from model.vision import Towers
from model.weights import load_model, save_model
from pipeline.evaluate import main
from pipeline.evaluation.exact_match import (
    Question,
    Score,
    ask,
    most_common_answers,
    read_questions,
    score,
    shuffle_images,
    table,
)
from pipeline.inference.engine import InferenceEngine
from preprocess.images.codec import read_image_file
from preprocess.prompts import load_tokenizer
from tests.support.launch import fork_python
from tests.support.tiny_data import write_byte_tokenizer


def asked(image: str, kind: str = "colour", answer: str = "red", question: str = "What colour is it?") -> Question:
    return Question(image=image, question=question, answer=answer, kind=kind)


def test_exact_match_is_counted_per_question_kind_and_over_all_questions() -> None:
    questions = [asked("a"), asked("b"), asked("c", "shape", "cross"), asked("d", "shape", "ring")]
    scores = score(questions, ["red", "blue", "cross", " ring\n"])
    assert scores == {
        "colour": Score(right=1, asked=2),
        "shape": Score(right=2, asked=2),
        "all": Score(right=3, asked=4),
    }
    assert scores["all"].exact_match == 0.75


@pytest.mark.parametrize("said", ["Red", "red.", "reddish", "", "dark red"])
def test_a_nearly_correct_answer_counts_as_wrong(said: str) -> None:
    assert score([asked("a")], [said])["all"].right == 0


def test_the_exact_match_table_ends_with_the_total() -> None:
    lines = table(score([asked("a"), asked("b", "shape")], ["red", "no"])).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "colour", "shape", "all"]
    assert lines[-1].split()[1:] == ["1", "2", "50.0%"]


def test_the_most_common_answer_is_determined_per_question_kind() -> None:
    questions = [asked("a"), asked("b"), asked("c", answer="blue"), asked("a", "shape", "ring")]
    assert most_common_answers(questions) == ["red", "red", "red", "ring"]


def test_shuffling_gives_every_question_another_image_from_its_question_kind() -> None:
    kinds = {"colour": range(20), "shape": range(7), "word": range(20, 24)}
    questions = [asked(f"{i}", kind, answer=f"{kind} {i}") for kind, images in kinds.items() for i in images]
    questions += [asked("0", "colour", question="And the rim?"), asked("1", "colour", question="And the rim?")]
    shuffled = shuffle_images(questions, seed=0)
    assert all(new.image != old.image for new, old in zip(shuffled, questions, strict=True))
    for kind in kinds:
        before, after = (sorted(q.image for q in each if q.kind == kind) for each in (questions, shuffled))
        assert before == after
    assert [(q.kind, q.question, q.answer) for q in shuffled] == [(q.kind, q.question, q.answer) for q in questions]
    assert shuffled == shuffle_images(questions, seed=0)
    assert shuffled != shuffle_images(questions, seed=1)


def test_shuffling_is_a_user_error_if_most_questions_of_a_kind_share_one_image() -> None:
    with pytest.raises(UserError, match="2 of 3 'colour' questions share one image"):
        shuffle_images([asked("a"), asked("a"), asked("b")], seed=0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ('["a"]', "line 2: found .*, expected an object"),
        ('{"image": "a.jpg", "question": "Q", "answer": 4, "kind": "k"}', "line 2: found .*, expected an object"),
        ('{"image": "a.jpg", "question": "Q", "kind": "k"}', "line 2: found .*, expected an object"),
    ],
)
def test_the_error_for_a_malformed_question_names_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "a.jpg", "question": "Q", "answer": "A", "kind": "k", "more": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=complaint):
        read_questions(path)


def test_questions_are_read_with_the_rules_of_annotation_files(tmp_path: Path) -> None:
    expected = [asked("a.jpg", question=f"One{separator}two") for separator in ("\u2028", "\x85")]
    rows = [json.dumps(vars(question), ensure_ascii=False) for question in expected]
    texts = {
        "a byte order mark": "\ufeff" + "\n".join(rows),
        "line ends of Windows": "\r\n".join(rows),
        "an array": f"[{','.join(rows)}]",
    }
    for kind, text in texts.items():
        (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8", newline="")
        assert read_questions(tmp_path / "questions.jsonl") == expected, kind
    (tmp_path / "questions.jsonl").write_bytes(gzip.compress(texts["an array"].encode()))
    assert read_questions(tmp_path / "questions.jsonl") == expected


def test_a_question_image_is_found_under_every_spelling_that_a_build_accepts(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / decomposed / f"{decomposed}.jpg")
    expected = read_image_file(tmp_path / decomposed / f"{decomposed}.jpg", 8)
    for name in (f"{composed}/{composed}.jpg", f".\\{decomposed}\\{decomposed}.jpg", f"{decomposed}\\{composed}.jpg"):
        assert np.array_equal(read_image_file(tmp_path / name, 8), expected), name
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / decomposed / f"{decomposed}.jpg", "sub\\1.jpg")
    assert np.array_equal(read_image_file(tmp_path / "packed/sub/1.jpg", 8), expected)


def test_a_missing_or_empty_question_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl is missing"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="found no questions"):
        read_questions(tmp_path / "empty.jsonl")


# -- With a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = write_byte_tokenizer(folder / "tokenizer")
    config = preset("tiny_v2")
    torch.manual_seed(0)
    tokenizer_json = (tokenizer / "tokenizer.json").read_text()
    save_model(
        folder / "m",
        config=config,
        state=Emma(config).state_dict(),
        towers=Towers(config.vision),
        tokenizer_json=tokenizer_json,
        extra={},
    )
    return folder / "m"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(noise.integers(0, 255, (90, 120, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def test_batched_answers_equal_single_answers_in_the_order_of_the_questions(model_folder: Path, images: Path) -> None:
    model, tokenizer = load_model(model_folder, torch.device("cpu"), torch.float32), load_tokenizer(model_folder)
    texts = ["Which?", "A rather long question, is it not?", "Which?", "Why?"]
    questions = [asked(f"{name}.png", question=text) for name, text in zip("abca", texts, strict=True)]
    batched = ask(model, tokenizer, questions, images, quiet=True)
    px, engine = model.config.vision.image_px, InferenceEngine(model, tokenizer)
    requests = [engine.request(q.question, read_image_file(images / q.image, px), max_new_tokens=16) for q in questions]
    alone = [engine.complete([request])[0].text for request in requests]
    assert batched == alone
    assert len(set(batched)) > 1


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
    main()


def test_the_evaluate_command_prints_a_table_and_writes_all_answers(
    model_folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "result.json"
    path.write_text("".join(json.dumps(vars(asked(f"{name}.png"))) + "\n" for name in "abc"))
    run_command(monkeypatch, model_folder, path, "--images", images, "--json", out, "--shuffle-images", "0")
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "0", "3"]
    result = json.loads(out.read_text())
    assert result["exact_match"] == {"colour": 0.0, "all": 0.0}
    assert sorted(row["image"] for row in result["answers"]) == ["a.png", "b.png", "c.png"]
    assert [row["image"] for row in result["answers"]] != ["a.png", "b.png", "c.png"]
    assert all(isinstance(row["said"], str) for row in result["answers"])


@pytest.mark.parametrize("option", ["--shuffle-images", "--shuffle-pictures"])
def test_the_shuffle_flag_and_its_hidden_old_name_have_the_same_effect(
    option, model_folder, images, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(vars(asked("a.png"))) + "\n")
    with pytest.raises(UserError, match="share one image"):
        run_command(monkeypatch, model_folder, path, "--images", images, option, "0")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--help")
    assert (option in capsys.readouterr().out) == (option == "--shuffle-images")


def test_an_unwritable_result_file_is_a_one_line_error_after_the_table(
    model_folder: Path, images: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "absent/result.json"
    path.write_text(json.dumps(vars(asked("a.png"))) + "\n")
    done = fork_python("-m", "pipeline.evaluate", model_folder, path, "--images", images, "--json", out)
    assert done.returncode == 2
    assert "all" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert str(out) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_error_for_a_missing_question_image_names_the_file(
    model_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(vars(asked("lost.png"))) + "\n")
    with pytest.raises(UserError, match=r"lost\.png cannot be used: the image file does not exist"):
        run_command(monkeypatch, model_folder, path, "--images", images)
