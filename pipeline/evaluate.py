"""Evaluate a model: on a file of questions, or on the paper's benchmarks.

python -m pipeline.evaluate MODEL --tasks all --data /data/benchmarks     # the paper's benchmarks; resumes
python -m pipeline.evaluate MODEL --tasks pope mme --data /data/benchmarks --card
python -m pipeline.evaluate MODEL runs/demo/raw/held_out/questions.jsonl --images runs/demo/raw/held_out
python -m pipeline.evaluate MODEL QUESTIONS.jsonl --images DIR --json result.json     # resumes
python -m pipeline.evaluate MODEL QUESTIONS.jsonl --images DIR --shuffle-images 0     # control: wrong images

A file of questions is scored by exact match: the share of answers that equal the expected text. A line of the file is
{"image": "0001.jpg", "question": "Which shape is it?", "answer": "circle", "kind": "shape"}.
Without "image", the question is asked as text alone. With --json or --journal, every answer is kept as soon as it is
computed, so the same command resumes: it computes only the answers that are missing for this model, these questions
and these images.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from model.errors import run_cli
from pipeline.evaluation.exact_match import MAX_NEW_TOKENS, ask, read_questions, report, score, shuffle_images, table
from pipeline.evaluation.run_tasks import add_task_arguments, run_tasks, task_options
from pipeline.figures.benchmarks import draw_benchmarks
from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.journal import Journal, answer_key
from pipeline.inference.questions import check_output, find_images
from preprocess.atomic import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder written by pipeline.export")
    parser.add_argument(
        "questions", type=Path, nargs="?", help="JSONL file with the keys image, question, answer, kind"
    )
    parser.add_argument("--images", type=Path, help="folder that the `image` paths are relative to")
    parser.add_argument("--shuffle-images", type=int, metavar="SEED", help="ask about wrong images, as a control")
    parser.add_argument("--shuffle-pictures", dest="shuffle_images", type=int, help=argparse.SUPPRESS)  # former name
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores and all answers to this file")
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="file that keeps answers for a later call (default: JSON.journal)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="questions answered together (default: 64)")
    add_task_arguments(parser)
    args = parser.parse_args()
    if options := task_options(args):
        run_tasks(options, draw_benchmarks)
        return
    check_output("--json", args.json, args.questions)
    check_output("--journal", args.journal, args.questions)
    questions = read_questions(args.questions)
    if args.shuffle_images is not None:
        questions = shuffle_images(questions, args.shuffle_images)
    find_images(questions, args.images)  # report a missing image before the model is loaded
    path = args.journal or (args.json and args.json.with_name(f"{args.json.name}.journal"))
    print(f"loading {args.model} to answer {len(questions)} questions", flush=True)
    engine = InferenceEngine(*load(args.model, args.device), max_batch=args.batch)
    with Journal(path, answer_key(args.model, engine, MAX_NEW_TOKENS)) if path else contextlib.nullcontext() as journal:
        answers = ask(engine, questions, args.images, journal=journal)
    scores = score(questions, answers)
    print(table(scores))
    if args.json:
        write_json(args.json, report(scores, questions, answers))


if __name__ == "__main__":
    run_cli(main)
