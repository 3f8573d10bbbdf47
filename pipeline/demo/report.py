"""The demo's report: a table, summary.json, and a sheet of images with questions and answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pipeline.evaluation.exact_match import Question, score
from pipeline.figures.curves import AnsweredQuestion
from pipeline.metrics.history import History

FIRST_STEPS, LAST_STEPS = 1, 20  # number of steps averaged into the first and the last loss
SHEET_ROWS, SHEET_COLUMNS = 3, 5
TERMS: tuple[Literal["text", "align"], ...] = ("text", "align")
CONTROLS = {
    "untrained": "the model before its first step",
    "commonest": "always the most common answer to that kind of question",
    "shuffled": "the trained model, shown another question's image",
}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Measurements of one demo run.

    seconds         by stage, and "total"
    samples         number of samples in the shards
    shards_job_s    seconds that the Ray job took, including its start-up
    rejects         number of rejected rows by reason
    answers         by name ("trained" or a key of CONTROLS), in the order of `questions`
    """

    seconds: dict[str, float]
    samples: int
    shards_job_s: float
    rejects: dict[str, int]
    global_batch: int
    killed_at_step: int
    history: History
    questions: Sequence[Question]
    answers: dict[str, Sequence[str]]

    def exact_match(self, who: str) -> float:
        return score(self.questions, self.answers[who]).total.exact_match

    @property
    def margin(self) -> float:
        """Exact match of the trained model minus that of the best control."""
        return self.exact_match("trained") - max(map(self.exact_match, CONTROLS))

    @property
    def resumed_at_step(self) -> int:
        return self.history.starts[-1].step

    def loss_ends(self, term: Literal["text", "align"]) -> tuple[float, float]:
        """Return a term's mean loss over the first steps and over the last. Text-only steps have no alignment loss."""
        pairs = (loss for _, loss in sorted(self.history.losses.items()))
        values = [value for text, align in pairs if (value := text if term == "text" else align) is not None]
        return fmean(values[:FIRST_STEPS]), fmean(values[-LAST_STEPS:])

    @property
    def train_samples_per_s(self) -> float:
        """Samples per second of training steps, excluding start-up, saves and the steps repeated after the kill."""
        ledger = self.history.ledger
        return len(self.history.losses) * self.global_batch / (ledger.training + ledger.waiting_for_data)


def summary(results: Results) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "seconds": {stage: round(seconds, 1) for stage, seconds in results.seconds.items()},
        "samples_per_s": {
            "shards": round(results.samples / results.shards_job_s, 1),
            "train": round(results.train_samples_per_s, 1),
        },
        "loss": {term: [round(value, 4) for value in results.loss_ends(term)] for term in TERMS},
        "exact_match": {who: round(results.exact_match(who), 4) for who in ("trained", *CONTROLS)},
        "exact_match_by_kind": {
            kind: round(each.exact_match, 4)
            for kind, each in score(results.questions, results.answers["trained"]).by_kind.items()
        },
        "questions": len(results.questions),
        "killed_at_step": results.killed_at_step,
        "resumed_at_step": results.resumed_at_step,
        "steps": results.history.step,
        "samples": results.samples,
        "rejects": sum(results.rejects.values()),
        "rejects_by_reason": results.rejects,
    }


def table(results: Results) -> str:
    """Format the results as the text table that the demo prints last."""
    facts = summary(results)
    seconds, rates = facts["seconds"], facts["samples_per_s"]
    lines = [f"{'stage':<10} {'seconds':>8} {'samples/s':>10}"]
    lines += [f"{stage:<10} {spent:>8.1f} {rates.get(stage, ''):>10}" for stage, spent in seconds.items()]
    lines += ["", f"{'loss':<10} {'first':>8} {'last':>10}"]
    lines += [f"{term:<10} {first:>8.3f} {last:>10.3f}" for term, (first, last) in facts["loss"].items()]
    lines += ["", f"exact match over {facts['questions']} held-out questions"]
    lines += [f"  {results.exact_match('trained'):>6.1%}  the trained model ({_by_kind(facts['exact_match_by_kind'])})"]
    lines += [f"  {results.exact_match(who):>6.1%}  {what}" for who, what in CONTROLS.items()]
    rejects = f"{facts['rejects']} rows rejected"
    killed = f"killed at step {results.killed_at_step}, resumed at step {results.resumed_at_step} of {facts['steps']}"
    return "\n".join([*lines, "", f"{killed}; {rejects}"])


def _by_kind(scores: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.0%}" for kind, value in scores.items())


def sample_answers(results: Results, images: Path) -> list[AnsweredQuestion]:
    """Return a random sample of the held-out questions with the trained model's answers, each kind in turn."""
    indices = _sample_by_kind(results.questions, SHEET_ROWS * SHEET_COLUMNS)
    return [
        AnsweredQuestion(
            image=images / str(results.questions[i].image),
            question=results.questions[i].question,
            answer=results.answers["trained"][i],
            truth=results.questions[i].answer,
        )
        for i in indices
    ]


def _sample_by_kind(questions: Sequence[Question], count: int) -> list[int]:
    """Return the indices of `count` random questions, taking the kinds in turn."""
    rng = random.Random(0)
    kinds = sorted({question.kind for question in questions})
    piles = [[i for i, question in enumerate(questions) if question.kind == kind] for kind in kinds]
    drawn = [rng.sample(pile, min(len(pile), count)) for pile in piles]
    turns = [pile[turn] for turn in range(count) for pile in drawn if turn < len(pile)]
    return turns[:count]
