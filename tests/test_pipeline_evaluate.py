"""Exact-match evaluation: question files, scores, the two control conditions, and the command."""

import gzip
import json
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.exact_match import (
    Question,
    Score,
    Scores,
    ask,
    most_common_answers,
    read_questions,
    report,
    score,
    shuffle_images,
    table,
)
from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.questions import IMAGES_AHEAD, _stream_images, find_images, read_rows
from preprocess.images.codec import read_image_file


def asked(image: str, kind: str = "colour", answer: str = "red", question: str = "What colour is it?") -> Question:
    return Question(image=image, question=question, answer=answer, kind=kind)


def test_exact_match_is_counted_per_question_kind_and_over_all_questions() -> None:
    questions = [asked("a"), asked("b"), asked("c", "shape", "cross"), asked("d", "shape", "ring")]
    scores = score(questions, ["red", "blue", "cross", " ring\n"])
    assert scores == Scores(
        by_kind={"colour": Score(right=1, asked=2), "shape": Score(right=2, asked=2)}, total=Score(right=3, asked=4)
    )
    assert scores.total.exact_match == 0.75


def test_a_question_kind_named_all_is_counted_once_in_the_total() -> None:
    questions = [asked("a", "all"), asked("b", "colour")]
    scores = score(questions, ["blue", "red"])
    assert scores.total == Score(right=1, asked=2)
    rows = [line.split() for line in table(scores).splitlines()[1:]]
    assert rows == [["all", "0", "1", "0.0%"], ["colour", "1", "1", "100.0%"], ["all", "1", "2", "50.0%"]]
    result = report(scores, questions, ["blue", "red"])
    assert result["exact_match"] == {"all": 0.5, "colour": 1.0}
    assert result["exact_match_by_kind"] == {"all": 0.0, "colour": 1.0}


@pytest.mark.parametrize("said", ["Red", "red.", "reddish", "", "dark red"])
def test_a_nearly_correct_answer_counts_as_wrong(said: str) -> None:
    assert score([asked("a")], [said]).total.right == 0


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
        before, after = (sorted(str(q.image) for q in each if q.kind == kind) for each in (questions, shuffled))
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
        (
            '{"images": ["a.jpg"], "question": "Q", "answer": "A", "kind": "k"}',
            "line 2: .* no `image`, but .* 'images'",
        ),
        (
            '{"question": "<|image_1|> Q", "answer": "A", "kind": "k"}',
            "line 2: .* no `image`, but the text holds <.image",
        ),
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
        assert find_images([asked(name)], tmp_path)
        assert np.array_equal(read_image_file(tmp_path / name, 8), expected), name
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / decomposed / f"{decomposed}.jpg", "sub\\1.jpg")
    assert find_images([asked("packed\\sub/1.jpg")], tmp_path)
    assert np.array_equal(read_image_file(tmp_path / "packed/sub/1.jpg", 8), expected)


def test_a_missing_or_empty_question_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl is missing"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="found no questions"):
        read_questions(tmp_path / "empty.jsonl")


# -- With a model ------------------------------------------------------------------------------------------------------


def test_batched_answers_equal_single_answers_in_the_order_of_the_questions(
    tiny_model: Path, noise_images: Path
) -> None:
    engine = InferenceEngine(*load(tiny_model, "cpu"))
    texts = ["Which?", "A rather long question, is it not?", "Which?", "Why?"]
    questions = [asked(f"{name}.png", question=text) for name, text in zip("abca", texts, strict=True)]
    batched = ask(engine, questions, noise_images, quiet=True)
    px = engine.model.config.vision.image_px
    requests = [
        engine.request(q.question, read_image_file(noise_images / str(q.image), px), max_new_tokens=16)
        for q in questions
    ]
    alone = [engine.complete([request])[0].text for request in requests]
    assert batched == alone
    assert len(set(batched)) > 1


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
    main()


def test_the_evaluate_command_prints_a_table_and_writes_all_answers(
    tiny_model: Path,
    noise_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "result.json"
    path.write_text("".join(json.dumps(vars(asked(f"{name}.png"))) + "\n" for name in "abc"))
    run_command(monkeypatch, tiny_model, path, "--images", noise_images, "--json", out, "--shuffle-images", "0")
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "0", "3"]
    result = json.loads(out.read_text())
    assert result["exact_match"] == {"colour": 0.0, "all": 0.0}
    assert sorted(row["image"] for row in result["answers"]) == ["a.png", "b.png", "c.png"]
    assert [row["image"] for row in result["answers"]] != ["a.png", "b.png", "c.png"]
    assert all(isinstance(row["said"], str) for row in result["answers"])


@pytest.mark.parametrize("option", ["--shuffle-images", "--shuffle-pictures"])
def test_the_shuffle_flag_and_its_hidden_old_name_have_the_same_effect(
    option, tiny_model, noise_images, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(vars(asked("a.png"))) + "\n")
    with pytest.raises(UserError, match="share one image"):
        run_command(monkeypatch, tiny_model, path, "--images", noise_images, option, "0")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--help")
    assert (option in capsys.readouterr().out) == (option == "--shuffle-images")


@pytest.mark.parametrize("option", ["--json", "--journal"])
def test_a_missing_folder_for_a_result_is_reported_before_the_model_is_loaded(
    option: str, noise_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "absent/result.json"
    path.write_text(json.dumps(vars(asked("a.png"))) + "\n")
    with pytest.raises(UserError, match=rf"{option} .*absent/result.json: the folder .* does not exist"):
        run_command(monkeypatch, tmp_path / "no_model", path, "--images", noise_images, option, out)


def test_the_error_for_a_missing_question_image_names_the_file(
    tiny_model: Path, noise_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(vars(asked("lost.png"))) + "\n")
    with pytest.raises(UserError, match=r"lost\.png cannot be used: the image file does not exist"):
        run_command(monkeypatch, tiny_model, path, "--images", noise_images)


def test_a_question_without_an_image_is_asked_as_text_and_needs_no_image_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "questions.jsonl", tmp_path / "result.json"
    rows = [{"question": "Say 4", "answer": "4", "kind": "say", **image} for image in ({}, {"image": None})]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_command(monkeypatch, tiny_model, path, "--json", out)
    engine = InferenceEngine(*load(tiny_model, "cpu"))
    [expected] = engine.complete([engine.request("Say 4", max_new_tokens=16)])
    assert [row["said"] for row in json.loads(out.read_text())["answers"]] == [expected.text] * 2


def test_shuffling_leaves_questions_without_an_image_unchanged() -> None:
    text_only = Question(question="Say 4", answer="4", kind="colour")
    questions = [asked("a"), text_only, asked("b")]
    assert shuffle_images(questions, seed=0) == [asked("b"), text_only, asked("a")]


@pytest.mark.parametrize(("value", "image"), [('["a.jpg"]', "a.jpg"), ("[]", None), ('""', None), ("null", None)])
def test_an_image_value_means_the_same_as_in_annotation_files(tmp_path: Path, value: str, image: str | None) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"image": {value}, "question": "Q", "answer": "A", "kind": "k"}}')
    assert [question.image for question in read_questions(path)] == [image]


@pytest.mark.parametrize("row", ['{"image": 4, "question": "Q"}', '{"image": ["a", "b"], "question": "Q"}'])
def test_an_image_value_of_a_wrong_type_is_a_user_error(tmp_path: Path, row: str) -> None:
    (tmp_path / "q.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"line 1: `image` is .*, expected a file name or null"):
        read_rows(tmp_path / "q.jsonl", required=("question",))


def test_a_question_that_refers_to_an_image_but_has_none_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "<image> What is it?"}')
    with pytest.raises(UserError, match="line 1: the question contains <image>, but the row has no `image`"):
        read_rows(tmp_path / "q.jsonl", required=("question",))


def test_questions_with_images_and_no_image_folder_are_a_user_error(tmp_path, monkeypatch):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(vars(asked("a.png"))) + "\n")
    with pytest.raises(UserError, match="--images: not given, although the questions name 1 images"):
        run_command(monkeypatch, tmp_path / "no_model", path)


def test_the_reader_of_questions_tolerates_what_the_reader_of_annotations_tolerates(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    row = '{"image": "a.jpg", "question": "What\u2028is\\u0000 it\\ud800?", "answer": "a\\u0000b", "kind": "k\x85"}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n" + row.encode().replace(b"it", b"\xff"))
    first, second = read_questions(path)
    assert (first.question, first.answer, first.kind) == ("What\u2028is it\ufffd?", "ab", "k\x85")
    assert second.question == "What\u2028is \ufffd\ufffd?"


@pytest.mark.parametrize("name", ["b.png", "a\x00.png", "\ud800.png", "x" * 300])
def test_an_image_name_that_names_no_file_is_a_one_line_user_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="the image file does not exist") as raised:
        find_images([asked(name)], tmp_path)
    str(raised.value).encode()


def test_images_are_decoded_shortly_before_they_are_needed_and_once_for_neighbours() -> None:
    decoded: list[str] = []

    def decode(name: str) -> np.ndarray:
        decoded.append(name)
        return np.zeros((1, 1, 3), np.uint8)

    names = [None, *(f"{i // 2}" for i in range(4 * IMAGES_AHEAD))]
    stream = _stream_images(names, decode)
    assert next(stream) is None
    assert len(decoded) <= IMAGES_AHEAD
    assert sum(pixels is not None for pixels in stream) == 4 * IMAGES_AHEAD
    assert sorted(decoded) == sorted(set(decoded))
