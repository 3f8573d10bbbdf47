"""The generate command: arguments, dirty text, dialogues, and files of questions that a kill interrupts."""

import io
import json
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline.generate import main
from pipeline.inference.engine import InferenceEngine, load
from preprocess.images.codec import read_image_file
from tests.support.launch import fork_python
from tests.support.tiny_model import save_tiny_model, write_images


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process, with these bytes on stdin, and return what it prints to stdout."""

    def run(*words: str | Path, stdin: bytes | None = b"") -> str:
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", stream)
        monkeypatch.setattr("sys.argv", ["generate", *map(str, words), "--device", "cpu"])
        main()
        return capsys.readouterr().out

    return run


SHORT = ("--max-new-tokens", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0, expected at least 1"),
        (["--batch", "0"], "--batch: found 0"),
        (["--temperature", "-1"], "--temperature: found -1.0"),
        (["--temperature", "nan"], "--temperature: found nan"),
        (["--top-k", "-1"], "--top-k: found -1"),
        (["--top-p", "0"], "--top-p: found 0.0"),
        (["--top-p", "1.5"], "--top-p: found 1.5"),
        (["--stop", ""], "--stop: found ''"),
        (["--image", "absent.png"], "absent.png cannot be used: the image file does not exist"),
        (["--prompt", "<image> What?"], "--prompt: contains <image>, but there is no image"),
        (["--images", "x"], "--images: cannot be used without --questions"),
        (["--out", "x"], "--out: cannot be used without --questions"),
        (["--questions", "x", "--out", "y", "--prompt", "z"], "--prompt: cannot be used with --questions"),
        (["--questions", "x"], "--out: not given"),
        (["--questions", "x", "--out", "absent/y"], "--out absent/y: the folder absent does not exist"),
        (["--questions", "x", "--out", "./x"], "--out x: is the file of questions"),
        (["--questions", "x", "--out", "."], "--out .: found a folder, expected a file"),
        (["--questions", "absent.jsonl", "--out", "y"], "absent.jsonl is missing"),
    ],
)
def test_a_wrong_argument_is_reported_before_the_model_is_loaded(generate, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        generate("no_model", *words)
    assert message in str(raised.value)


def test_a_closed_stdin_is_a_user_error_for_a_dialogue_only(generate, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="stdin is closed"):
        generate("no_model", stdin=None)
    assert generate(tiny_model, "--prompt", "Why?", *SHORT, stdin=None)


# -- Text that is not text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", ["What\udcff?", "What\udce2\udc82?"], ids=["one byte", "cut character"])
def test_undecodable_bytes_in_a_prompt_are_replaced_as_in_training(generate, tiny_model: Path, dirty: str) -> None:
    found = json.loads(generate(tiny_model, "--prompt", dirty, "--json", *SHORT))
    assert found["question"] == "What\ufffd?"
    assert found == json.loads(generate(tiny_model, "--prompt", "What\ufffd?", "--json", *SHORT))


def test_a_dialogue_goes_on_after_a_bad_line_and_ends_at_an_empty_one(generate, tiny_model: Path) -> None:
    lines = b"\xef\xbb\xbfHow\x00 much?\n\xff \xed\xa0\x80\n\x00\nWhy?\n\nnot asked\n"
    answers = [json.loads(line) for line in generate(tiny_model, "--json", *SHORT, stdin=lines).splitlines()]
    assert [answer["question"] for answer in answers] == ["How much?", "\ufffd \ufffd\ufffd\ufffd", "Why?"]
    clean = "".join(f"{answer['question']}\n" for answer in answers).encode()
    assert generate(tiny_model, "--json", *SHORT, stdin=clean).splitlines() == [json.dumps(each) for each in answers]


# -- One question ------------------------------------------------------------------------------------------------------


def test_one_question_prints_the_engines_answer(generate, tiny_model: Path, noise_images: Path) -> None:
    engine = InferenceEngine(*load(tiny_model, "cpu"))
    image = read_image_file(noise_images / "a.png", engine.model.config.vision.image_px)
    [expected] = engine.complete([engine.request("Which colour?", image, max_new_tokens=8)])
    words = [tiny_model, "--image", noise_images / "a.png", "--prompt", "Which colour?", "--max-new-tokens", "8"]
    assert generate(*words).strip() == expected.text
    assert json.loads(generate(*words, "--json")) == {"question": "Which colour?", "answer": expected.text}


def test_a_seed_repeats_a_sampled_answer_and_another_seed_changes_it(generate, tiny_model: Path) -> None:
    words = [tiny_model, "--prompt", "Which?", "--temperature", "2", "--max-new-tokens", "40"]
    first = generate(*words, "--seed", "1")
    assert first == generate(*words, "--seed", "1")
    assert first != generate(*words, "--seed", "2")


def test_top_k_without_a_temperature_samples(generate, tiny_model: Path) -> None:
    words = [tiny_model, "--prompt", "Which?", "--max-new-tokens", "40"]
    greedy = generate(*words)
    assert generate(*words, "--top-k", "1") == greedy
    assert generate(*words, "--top-k", "100", "--seed", "3") != greedy


def test_an_answer_ends_before_a_stop_string(generate, tiny_model: Path) -> None:
    words = [tiny_model, "--prompt", "Which?", "--temperature", "1", "--max-new-tokens", "16", "--json"]
    whole = json.loads(generate(*words))["answer"]
    stop = whole[1]
    assert json.loads(generate(*words, "--stop", "zzz", "--stop", stop))["answer"] == whole[: whole.index(stop)].strip()


def test_the_image_of_one_question_is_found_as_a_build_finds_it(generate, tiny_model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(write_images(tmp_path) / "a.png", "sub/a.png")
    for image in (tmp_path / "packed/sub/a.png", f"{tmp_path}\\.\\a.png"):
        assert generate(tiny_model, "--image", image, "--prompt", "What?", "--max-new-tokens", "1")


# -- Files of questions ------------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
from pipeline.inference.journal import Journal

def add_and_die(journal, question_id, answer, add=Journal.add):
    add(journal, question_id, answer)
    if len(journal.answers) == 5:
        journal._file.write(b'{"id": "torn')
        journal._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = add_and_die
sys.argv[0] = "generate"
runpy.run_module("pipeline.generate", run_name="__main__")
"""


def write_questions(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"question_id": i, "answer": "true answer", "question": f"Question {i // 3}?", "image": f"{'abc'[i % 3]}.png"}
        for i in range(9)
    ]
    rows += [{"question_id": 9, "question": "Say 4"}, {"question_id": 10, "question": "Say 4", "image": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--seed", "4"]], ids=["greedy", "sampled"])
def test_a_killed_command_resumes_and_writes_the_same_bytes_as_without_a_kill(
    generate, tiny_model: Path, noise_images: Path, tmp_path: Path, sampling: list[str]
) -> None:
    rows = write_questions(tmp_path / "q.jsonl")
    words: list[str | Path] = [tiny_model, "--questions", tmp_path / "q.jsonl", "--images", noise_images]
    words += [*SHORT, *sampling, "--out"]
    generate(*words, tmp_path / "whole.jsonl")

    killed = fork_python("-c", KILLED, *words, tmp_path / "a.jsonl", "--device", "cpu")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "a.jsonl").exists()
    assert "11 questions, 5 of them answered by an earlier call" in generate(*words, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["input"] for answer in answers] == [{"image": None, **row} for row in rows]
    assert {answer["finish_reason"] for answer in answers} <= {"length", "stop"}
    assert len({answer["answer"] for answer in answers}) > 2
    assert (answers[9]["answer"] == answers[10]["answer"]) == (not sampling)  # a repeated question is sampled anew


def test_sampled_answers_depend_neither_on_the_file_order_nor_on_image_times(
    generate, tiny_model: Path, noise_images: Path, tmp_path: Path
) -> None:
    write_questions(tmp_path / "q.jsonl")
    lines = (tmp_path / "q.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(lines[8::-1]))
    write_images(tmp_path)
    words = [tiny_model, "--max-new-tokens", "12", "--temperature", "1.5", "--out", tmp_path / "out.jsonl"]
    answers = []
    for questions, images in ((tmp_path / "q.jsonl", noise_images), (tmp_path / "reversed.jsonl", tmp_path)):
        generate(*words, "--questions", questions, "--images", images)
        rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        answers.append({row["input"]["question_id"]: row["answer"] for row in rows if row["input"]["image"]})
    assert answers[0] == answers[1]


def test_only_answers_of_the_same_model_settings_and_content_are_reused(
    generate, tiny_model: Path, noise_images: Path, tmp_path: Path
) -> None:
    write_questions(tmp_path / "q.jsonl")
    words = ["--questions", tmp_path / "q.jsonl", "--images", noise_images, "--out", tmp_path / "a.jsonl"]
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert ", 5 of" not in generate(tiny_model, *words, *SHORT)
    assert "11 questions, 11 of them" in generate(tiny_model, *words, *SHORT, "--batch", "2")
    answers = (tmp_path / "a.jsonl").read_bytes()
    assert "  11 questions\n" in generate(other, *words, *SHORT)
    assert (tmp_path / "a.jsonl").read_bytes() != answers
    assert "  11 questions\n" in generate(tiny_model, *words, "--max-new-tokens", "5")
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"question": "Another one"}\n')
    assert "12 questions, 11 of them" in generate(tiny_model, *words, *SHORT)


def test_a_changed_image_is_asked_about_again(generate, tiny_model: Path, noise_images: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes((noise_images / "a.png").read_bytes())
    (tmp_path / "q.jsonl").write_text('{"question": "What?", "image": "a.png"}\n')
    words = [tiny_model, "--questions", tmp_path / "q.jsonl", "--images", tmp_path, "--out", tmp_path / "o", *SHORT]
    generate(*words)
    image.write_bytes((noise_images / "b.png").read_bytes())
    assert "  1 questions\n" in generate(*words)
