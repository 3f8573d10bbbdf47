"""Exact match: reading question files, answering in batches, control experiments, and scores by kind of question."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError
from model.weights import LoadedModel
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.requests import Request
from preprocess.annotations.reader import rows_with_place
from preprocess.images.codec import read_image_file
from preprocess.prompts import Tokenizer, encode_prompt
from preprocess.rejects import Rejected

BATCH = 64
MAX_NEW_TOKENS = 16
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a question file.

    image   path relative to the image folder
    kind    groups the questions that share a set of possible answers
    """

    image: str
    question: str
    answer: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """Number of questions asked, and number of questions answered correctly."""

    right: int
    asked: int

    @property
    def exact_match(self) -> float:
        return self.right / self.asked


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions, which may have every format of an annotation file. Raises: UserError with the line."""
    questions = [_question(row, f"{path}, {place}") for place, row in rows_with_place(path)]
    if not questions:
        raise UserError(f"{path}: found no questions, expected one JSON object per line")
    return questions


def _question(row: Any | Rejected, where: str) -> Question:
    keys = Question.__dataclass_fields__
    if isinstance(row, Rejected):
        raise UserError(f"{where}: not JSON ({row.detail})")
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
        raise UserError(f"{where}: found {str(row)[:80]}, expected an object with the strings {', '.join(keys)}")
    return Question(**{key: row[key] for key in keys})


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Give every question the image of another question of its kind.

    This control shows how many questions the model answers correctly without the information in the image.

    Raises: UserError if half or more of the questions of a kind share one image.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        by_kind[question.kind].append(i)
    shuffled = list(questions)
    for kind, members in by_kind.items():
        images = sorted({questions[i].image for i in members})
        random.Random(f"{seed} {kind}").shuffle(images)
        # Sort so that equal images are adjacent, then rotate by the longest run: no question keeps its own image.
        members.sort(key=lambda i: images.index(questions[i].image))
        longest = max(Counter(questions[i].image for i in members).values())
        if 2 * longest > len(members):
            raise UserError(f"--shuffle-images: {longest} of {len(members)} {kind!r} questions share one image")
        for i, other in zip(members, members[longest:] + members[:longest], strict=True):
            shuffled[i] = replace(questions[i], image=questions[other].image)
    return shuffled


def ask(
    model: LoadedModel, tokenizer: Tokenizer, questions: Sequence[Question], images: Path, *, quiet: bool = False
) -> list[str]:
    """Return the model's answers in the order of the questions, printing progress unless `quiet`."""
    prompts = [
        encode_prompt([{"from": "human", "value": question.question}], model.config.template, tokenizer)
        for question in questions
    ]
    image_px = model.config.vision.image_px
    pixels: dict[str, np.ndarray] = {}
    for question in questions:
        if question.image not in pixels:
            pixels[question.image] = read_image_file(images / question.image, image_px)
    answers = [""] * len(prompts)
    progress = _Progress(len(prompts), quiet=quiet)
    requests = (
        Request(prompt=prompt, image=pixels[question.image], max_new_tokens=MAX_NEW_TOKENS)
        for prompt, question in zip(prompts, questions, strict=True)
    )
    engine = InferenceEngine(model, tokenizer, max_batch=BATCH)
    for done, (i, completion) in enumerate(engine.run(requests), 1):
        answers[i] = completion.text
        progress.update(done)
    return answers


class _Progress:
    """Progress line with rate and time left, printed every few seconds."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total, self.quiet = total, quiet
        self.started = self.last_print = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or (now - self.last_print < REPORT_EVERY_S and done < self.total):
            return
        self.last_print = now
        rate = done / max(now - self.started, 1e-9)
        print(f"  {done}/{self.total} questions  {rate:.1f}/s  {(self.total - done) / rate:.0f} s left", flush=True)


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Score]:
    """Score exact match by kind, and under "all" over every question. Surrounding white space is ignored."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        for kind in (question.kind, "all"):
            asked[kind] += 1
            right[kind] += answer.strip() == question.answer.strip()
    kinds = sorted(asked, key=lambda kind: (kind == "all", kind))
    return {kind: Score(right=right[kind], asked=asked[kind]) for kind in kinds}


def most_common_answers(questions: Sequence[Question]) -> list[str]:
    """Answer each question with the most common answer of its kind: no constant answer scores higher."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def table(scores: dict[str, Score]) -> str:
    """Format scores as a text table with a row per kind."""
    lines = [f"{'kind':<12} {'right':>6} {'asked':>6} {'exact match':>12}"]
    lines += [f"{kind:<12} {s.right:>6} {s.asked:>6} {s.exact_match:>12.1%}" for kind, s in scores.items()]
    return "\n".join(lines)


def report(scores: dict[str, Score], questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Return the content of the `--json` file: the scores, and every question with the model's answer."""
    rows = [{**asdict(question), "said": answer} for question, answer in zip(questions, answers, strict=True)]
    return {"exact_match": {kind: s.exact_match for kind, s in scores.items()}, "answers": rows}
