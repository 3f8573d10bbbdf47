"""Exact match: question files with known answers, control experiments, and scores by kind of question."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from pipeline.inference import questions as question_files
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.journal import Journal

MAX_NEW_TOKENS = 16
TOTAL = "all"  # name of the total in tables and in the `exact_match` of a report


@dataclass(frozen=True, kw_only=True)
class Question(question_files.Question):
    """A question with its answer. Questions of one `kind` share a set of possible answers."""

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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores by kind of question, in order of the kinds, and over all questions."""

    by_kind: dict[str, Score]
    total: Score


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions with known answers. Raises: UserError that names the row."""
    keys = ("question", "answer", "kind")
    return [
        Question(image=row["image"], **{key: row[key] for key in keys})
        for row in question_files.read_rows(path, required=keys)
    ]


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Give every question that has an image the image of another question of its kind.

    This control shows how many questions the model answers correctly without the information in the image.

    Raises: UserError if half or more of the questions of a kind share one image.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        if question.image is not None:
            by_kind[question.kind].append(i)
    shuffled = list(questions)
    for kind, members in by_kind.items():
        images = sorted({str(questions[i].image) for i in members})
        random.Random(f"{seed} {kind}").shuffle(images)
        # Sort so that equal images are adjacent, then rotate by the longest run: no question keeps its own image.
        members.sort(key=lambda i: images.index(str(questions[i].image)))
        longest = max(Counter(questions[i].image for i in members).values())
        if 2 * longest > len(members):
            raise UserError(f"--shuffle-images: {longest} of {len(members)} {kind!r} questions share one image")
        for i, other in zip(members, members[longest:] + members[:longest], strict=True):
            shuffled[i] = replace(questions[i], image=questions[other].image)
    return shuffled


def ask(
    engine: InferenceEngine,
    questions: Sequence[Question],
    images: Path | None,
    *,
    journal: Journal | None = None,
    quiet: bool = False,
) -> list[str]:
    """Return the model's answers in the order of the questions, and print progress unless `quiet`."""
    answers = question_files.answer_questions(
        engine,
        questions,
        question_files.find_images(questions, images),
        max_new_tokens=MAX_NEW_TOKENS,
        journal=journal,
        quiet=quiet,
    )
    return [answer.text for answer in answers]


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score exact match. Surrounding white space is ignored."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        asked[question.kind] += 1
        right[question.kind] += answer.strip() == question.answer.strip()
    return Scores(
        by_kind={kind: Score(right=right[kind], asked=asked[kind]) for kind in sorted(asked)},
        total=Score(right=right.total(), asked=asked.total()),
    )


def most_common_answers(questions: Sequence[Question]) -> list[str]:
    """Answer each question with the most common answer of its kind: no constant answer scores higher."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def table(scores: Scores) -> str:
    """Format scores as a text table with a row per kind, and a last row with the total."""
    lines = [f"{'kind':<12} {'right':>6} {'asked':>6} {'exact match':>12}"]
    rows = [*scores.by_kind.items(), (TOTAL, scores.total)]
    lines += [f"{kind:<12} {each.right:>6} {each.asked:>6} {each.exact_match:>12.1%}" for kind, each in rows]
    return "\n".join(lines)


def report(scores: Scores, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Return the content of the `--json` file: the scores, and every question with the model's answer.

    In `exact_match`, "all" is the total, also if a kind has this name. `exact_match_by_kind` holds the kinds only.
    """
    by_kind = {kind: each.exact_match for kind, each in scores.by_kind.items()}
    return {
        "exact_match": {**by_kind, TOTAL: scores.total.exact_match},
        "exact_match_by_kind": by_kind,
        "answers": [{**asdict(question), "said": answer} for question, answer in zip(questions, answers, strict=True)],
    }
