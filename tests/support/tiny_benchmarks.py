"""Small data sets of the paper's benchmarks, with scripted answers and scores that were counted by hand.

The columns are those that lmms-eval's tasks read. The question of each row ends with a mark such as `#pope-3`, by which
the scripted model finds its answer, and its image has a grey level that follows from the row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from pipeline.evaluation.benchmarks import BENCHMARKS, IMAGES

Rows = list[tuple[dict[str, Any], str]]  # columns of a row, and the scripted answer

# The scores that the scripted answers get. The comments in the functions below say how each was counted.
EXPECTED = {
    "vqav2": 100 * 1.6 / 3,
    "gqa": 100 * 2 / 3,
    "vizwiz": 100 * 1.6 / 3,
    "textvqa": 100 * 2.6 / 4,
    "vsr": 75.0,
    "pope": 60.0,
    "hallusionbench": 60.0,
    "mmbench": 60.0,
    "mmbench_cn": 50.0,
    "ccbench": 25.0,
    "mme": 350.0,
    "seed": 75.0,
    "scienceqa": 60.0,
    "ai2d": 75.0,
}


def grey_level(row: int) -> int:
    return 20 + 23 * row


def _image(row: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (grey_level(row),) * 3)


def vqav2() -> Rows:
    """All ten people said red: 1. Two of ten said two: (2 × 1/3 + 8 × 2/3) / 10 = 0.6. Nobody said blue: 0."""

    def people(*answers: str) -> list[dict[str, Any]]:
        return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers)]

    rows = [
        (people(*["red"] * 10), "Red."),
        (people(*["two"] * 2, *["three"] * 8), "Two"),
        (people(*["red"] * 10), "blue"),
    ]
    return [
        ({"question_id": i, "question": "Which?", "answers": answers}, said) for i, (answers, said) in enumerate(rows)
    ]


def gqa() -> Rows:
    """Case and punctuation are ignored: 2 of 3. The images are in another configuration, in reverse order."""
    rows = [("yes", "Yes."), ("left", "right"), ("car", "car")]
    return [
        ({"id": str(i), "imageId": f"n{i}", "question": "Which?", "answer": truth}, said)
        for i, (truth, said) in enumerate(rows)
    ]


def gqa_images() -> list[dict[str, Any]]:
    return [{"id": f"n{i}", "image": _image(i)} for i in reversed(range(3))]


def vizwiz() -> Rows:
    """As in VQAv2: 1, 0.6 and 0."""
    rows = [
        (["unanswerable"] * 10, "Unanswerable"),
        (["soup"] * 2 + ["can"] * 8, "soup"),
        (["red"] * 10, "blue"),
    ]
    return [
        ({"question_id": f"q{i}", "question": "Which?", "answers": answers, "category": "other"}, said)
        for i, (answers, said) in enumerate(rows)
    ]


def textvqa() -> Rows:
    """As in VQAv2: 1, 1, 0.6 and 0."""
    rows = [
        (["stop"] * 10, "STOP"),
        (["5"] * 10, "five"),
        (["coke"] * 2 + ["pepsi"] * 8, "coke"),
        (["exit"] * 10, "enter"),
    ]
    return [
        ({"question_id": i, "question": "What does it say?", "answers": answers, "ocr_tokens": ["x"]}, said)
        for i, (answers, said) in enumerate(rows)
    ]


def vsr() -> Rows:
    """3 of 4. The scripted answer is the word that the model finds more likely."""
    rows = [(1, "True"), (0, "False"), (1, "False"), (0, "False")]
    return [({"caption": "The cup is on the table.", "label": label}, said) for label, said in rows]


def pope() -> Rows:
    """3 of 5: a full stop makes an answer wrong. Precision 2/3, recall 2/2."""
    rows = [("yes", "Yes"), ("no", "no"), ("yes", "Yes."), ("no", "yes"), ("yes", "yes")]
    return [
        (
            {"id": str(i), "question_id": str(i), "question": "Is there a car?", "answer": truth, "category": "random"},
            said,
        )
        for i, (truth, said) in enumerate(rows)
    ]


def hallusionbench() -> Rows:
    """3 of 5: an answer without yes counts as no. Of the questions 0 and 1, neither is right for all its figures."""
    rows = [("1", "Yes, it is."), ("0", "No."), ("1", "I do not know."), ("0", "Yes"), ("1", "yes")]
    return [
        (
            {
                "category": "VD",
                "subcategory": "illusion",
                "set_id": "0",
                "figure_id": str(i % 3),
                "question_id": str(i % 2),
                "question": "Is it?",
                "gt_answer": truth,
                "gt_answer_details": "…",
            },
            said,
        )
        for i, (truth, said) in enumerate(rows)
    ]


def _choices(rows: list[tuple[int, str, str]], **more: Any) -> Rows:
    return [
        (
            {"index": index, "question": "Which?", "answer": truth, "A": "a dog", "B": "a red cat", "C": "a bus"}
            | {"D": "a tree", "category": "kind", "source": "here", **more},
            said,
        )
        for index, truth, said in rows
    ]


def mmbench() -> Rows:
    """3 of 5 questions. A question counts if its rotated copies (index + 1000000) are right too: 1 is, 2 is not.

    3 names its letter in a sentence, 4 is wrong, and 5 names the text of its choice.
    """
    rows = [(1, "A", "A"), (1_000_001, "B", "B."), (2, "A", "A"), (1_000_002, "B", "C")]
    rows += [(3, "B", "The answer is (B)."), (4, "C", "A"), (5, "B", "It is a red cat")]
    return _choices(rows, **{"hint": "nan", "L2-category": "wide", "split": "dev"})


def mmbench_cn() -> Rows:
    """2 of 4: an answer without a letter is wrong. The stock task would score a random letter."""
    rows = [(1, "B", "B"), (2, "A", "C"), (3, "A", "我不知道"), (4, "C", "答案是C")]
    return _choices(rows, **{"hint": None, "L2-category": "wide", "split": "dev"})


def ccbench() -> Rows:
    """1 of 4: an answer without a letter is wrong."""
    return _choices([(1, "B", "B"), (2, "A", "C"), (3, "A", "我不知道"), (4, "C", "D")])


def mme() -> Rows:
    """Perception: existence (200 + 50) / 2 = 125, OCR 200. Cognition: code reasoning (0 + 50) / 2 = 25.

    A pair of questions about an image gets 100 × the share of right answers, and 100 more if both are right.
    """
    rows = [
        ("existence", "e1", "Yes", "Yes"),
        ("existence", "e1", "No", "no."),
        ("existence", "e2", "Yes", "yes, it is"),
    ]
    rows += [("existence", "e2", "No", "yes"), ("OCR", "o1", "Yes", "y"), ("OCR", "o1", "No", "No")]
    rows += [("code_reasoning", "c1", "Yes", "no"), ("code_reasoning", "c1", "No", "maybe")]
    rows += [("code_reasoning", "c2", "Yes", "yes"), ("code_reasoning", "c2", "No", "yes")]
    return [
        (
            {"question_id": pair, "question": "Is it? Please answer yes or no.", "answer": truth, "category": category},
            said,
        )
        for category, pair, truth, said in rows
    ]


def seed() -> Rows:
    """3 of 4 questions about images. The question about a video is not asked, although its answer would be right."""
    rows = [
        ("image", "A", "A"),
        ("image", "A", "A. red"),
        ("image", "B", "b"),
        ("image", "B", "C"),
        ("video", "D", "D"),
    ]
    return [
        (
            {"question_id": f"q{i}", "question": "Which?", "answer": truth, "data_type": kind}
            | {f"choice_{letter}": f"choice {letter}" for letter in "abcd"},
            said,
        )
        for i, (kind, truth, said) in enumerate(rows)
    ]


def scienceqa() -> Rows:
    """3 of 5: the letter counts, alone or before a full stop, but not the text of the choice."""
    rows = [(0, "A"), (1, "B. two"), (1, "b"), (0, "C"), (0, "one")]
    return [
        ({"hint": "", "question": "Which?", "choices": ["one", "two", "three"], "answer": truth}, said)
        for truth, said in rows
    ]


def ai2d() -> Rows:
    """3 of 4: the letter counts, alone or before a full stop."""
    rows = [("0", "A"), ("1", "B. two"), ("1", "b"), ("0", "C.")]
    return [({"question": "Which?", "options": ["one", "two", "three"], "answer": t}, said) for t, said in rows]


TABLES = {table.__name__: table for table in (vqav2, gqa, vizwiz, textvqa, vsr, pope, hallusionbench, mmbench)}
TABLES |= {table.__name__: table for table in (mmbench_cn, ccbench, mme, seed, scienceqa, ai2d)}


def write_benchmarks(folder: Path) -> dict[str, str]:
    """Write all data sets as parquet files, as pipeline.prefetch stores them. Return the answer to each mark."""
    answers = {}
    for name, table in TABLES.items():
        documents = []
        for row, (document, said) in enumerate(table()):
            mark = f"#{name}-{row}"
            answers[mark] = said
            text = "caption" if name == "vsr" else "question"
            image = {} if name == "gqa" else {"image": [_image(row)] if name == "seed" else _image(row)}
            documents.append({**document, text: f"{document[text]} {mark}", **image})
        split, *_ = BENCHMARKS[name].patterns
        _write(folder, name, split, documents)
    _write(folder, "gqa", IMAGES, gqa_images())
    return answers


def _write(folder: Path, name: str, key: str, documents: list[dict[str, Any]]) -> None:
    import datasets  # part of the extra [eval]

    path = folder / name / BENCHMARKS[name].patterns[key].replace("*", "00000-of-00001")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(documents).with_format("arrow")[:]
    # pipeline.prefetch writes VSR, and its file does not say that a column holds images.
    pq.write_table(table.replace_schema_metadata(None) if name == "vsr" else table, path)
