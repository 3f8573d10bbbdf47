"""Held-out exact match: ask a model every question of a file, and count the answers that are right to the letter.

python -m pipeline.evaluate MODEL runs/demo/raw/held_out/questions.jsonl --images runs/demo/raw/held_out
python -m pipeline.evaluate MODEL QUESTIONS.jsonl --images DIR --json result.json
python -m pipeline.evaluate MODEL QUESTIONS.jsonl --images DIR --shuffle-pictures 0     # does it look at all?

A line of the file is {"image": "0001.jpg", "question": "Which shape is it?", "answer": "circle", "kind": "shape"}.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError, run_cli
from model.weights import LoadedModel
from pipeline.generate import complete, load
from preprocess.atomic import write_json
from preprocess.images.codec import read_image_file
from preprocess.prompts import Tokenizer, encode_prompt

BATCH = 64
MAX_NEW_TOKENS = 16
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Question:
    """`image` is relative to the pictures' folder; `kind` groups the questions that share a set of possible answers."""

    image: str
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Score:
    right: int
    asked: int

    @property
    def exact_match(self) -> float:
        return self.right / self.asked


def read_questions(path: Path) -> list[Question]:
    """Raises: UserError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions {path} cannot be read: {error}") from None
    questions = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UserError(f"{path} holds no question; expected one JSON object a line")
    return questions


def _question(line: str, where: str) -> Question:
    keys = Question.__dataclass_fields__
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
        raise UserError(f"{where}: expected an object with the strings {', '.join(keys)}; found {line.strip()[:80]}")
    return Question(**{key: row[key] for key in keys})


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Every question about a wrong picture, one that the same kind of question was made for.

    Raises: UserError if half of a kind's questions or more are about one picture.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        by_kind[question.kind].append(i)
    shuffled = list(questions)
    for kind, members in by_kind.items():
        pictures = sorted({questions[i].image for i in members})
        random.Random(f"{seed} {kind}").shuffle(pictures)
        # Turning a list in which equal pictures stand together, by the longest run of them, moves each off its own.
        members.sort(key=lambda i: pictures.index(questions[i].image))
        longest = max(Counter(questions[i].image for i in members).values())
        if 2 * longest > len(members):
            raise UserError(f"--shuffle-pictures: {longest} of {len(members)} {kind!r} questions share one picture")
        for i, other in zip(members, members[longest:] + members[:longest], strict=True):
            shuffled[i] = replace(questions[i], image=questions[other].image)
    return shuffled


def ask(
    model: LoadedModel, tokenizer: Tokenizer, questions: Sequence[Question], images: Path, quiet: bool = False
) -> list[str]:
    """The model's answers, in the questions' order. Prompts of one length run together, so none is padded."""
    prompts = [
        encode_prompt([{"from": "human", "value": question.question}], model.config.template, tokenizer)
        for question in questions
    ]
    image_px = model.config.vision.image_px
    pixels: dict[str, np.ndarray] = {}
    for question in questions:
        if question.image not in pixels:
            pixels[question.image] = read_image_file(images / question.image, image_px)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    progress = _Progress(len(prompts), quiet)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        pictures = [pixels[questions[i].image] for i in rows]
        said = complete(model, tokenizer, [prompts[i] for i in rows], pictures, MAX_NEW_TOKENS)
        for i, text in zip(rows, said, strict=True):
            answers[i] = text
        progress.tick(start + len(rows))
    return answers


class _Progress:
    """A line with rate and time left, now and then."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.quiet = total, quiet
        self.started = self.shown = time.monotonic()

    def tick(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or (now - self.shown < REPORT_EVERY_S and done < self.total):
            return
        self.shown = now
        rate = done / max(now - self.started, 1e-9)
        print(f"  {done}/{self.total} questions  {rate:.1f}/s  {(self.total - done) / rate:.0f} s left", flush=True)


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Score]:
    """Exact match by kind, and as "all" over every question; blanks around an answer do not count."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        for kind in (question.kind, "all"):
            asked[kind] += 1
            right[kind] += answer.strip() == question.answer.strip()
    return {kind: Score(right[kind], asked[kind]) for kind in sorted(asked, key=lambda kind: (kind == "all", kind))}


def commonest_answers(questions: Sequence[Question]) -> list[str]:
    """For each question the answer that its kind has most often, in these very questions: no constant does better."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def table(scores: dict[str, Score]) -> str:
    lines = [f"{'kind':<12} {'right':>6} {'asked':>6} {'exact match':>12}"]
    lines += [f"{kind:<12} {s.right:>6} {s.asked:>6} {s.exact_match:>12.1%}" for kind, s in scores.items()]
    return "\n".join(lines)


def report(scores: dict[str, Score], questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """What `--json` writes: the scores, and every question with what was said."""
    said = [{**asdict(question), "said": answer} for question, answer in zip(questions, answers, strict=True)]
    return {"exact_match": {kind: s.exact_match for kind, s in scores.items()}, "answers": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that pipeline.export wrote")
    parser.add_argument("questions", type=Path, help="JSONL of image, question, answer, kind")
    parser.add_argument("--images", type=Path, required=True, help="the folder that `image` is relative to")
    parser.add_argument("--shuffle-images", type=int, metavar="SEED", help="ask about wrong images, as a control")
    parser.add_argument("--shuffle-pictures", dest="shuffle_images", type=int, help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and answers there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    questions = read_questions(args.questions)
    if args.shuffle_images is not None:
        questions = shuffle_images(questions, args.shuffle_images)
    answers = ask(*load(args.model, args.device), questions, args.images)
    scores = score(questions, answers)
    print(table(scores))
    if args.json:
        write_json(args.json, report(scores, questions, answers))


if __name__ == "__main__":
    run_cli(main)
