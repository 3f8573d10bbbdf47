"""Ask a trained model: one question, a dialogue in the terminal, or a file of questions.

python -m pipeline.generate MODEL --image photo.jpg --prompt "What colour is the car?"
python -m pipeline.generate MODEL --prompt "Name three rivers." --temperature 0.7 --seed 1   # text alone, sampled
python -m pipeline.generate MODEL --image photo.jpg                                          # until an empty line
python -m pipeline.generate MODEL --questions Q.jsonl --images DIR --out A.jsonl             # the same command resumes

A line of Q.jsonl is {"image": "0001.jpg", "question": "What is it?"}, and may have other keys. Without "image", the
question is asked as text alone. A line of A.jsonl is {"input": LINE OF Q.jsonl, "answer": …, "finish_reason": …}, where
the reason is "length" if the answer was cut at --max-new-tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from model.errors import UserError, run_cli
from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.journal import Journal, answer_key
from pipeline.inference.questions import Question, answer_questions, check_output, find_images, read_rows
from pipeline.inference.requests import Sampling
from preprocess.atomic import publish
from preprocess.images.codec import read_image_file
from preprocess.prompts import IMAGE_TOKEN, clean_terminal_text, clean_text

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = _parser().parse_args()
    _check(args)
    args.stop = tuple(map(clean_terminal_text, args.stop))
    if args.questions:
        _answer_file(args)
    else:
        _converse(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder written by pipeline.export")
    add("--image", type=Path, help="image file to ask about")
    add("--prompt", help="one question; without it, start a dialogue in the terminal")
    add("--questions", type=Path, metavar="JSONL", help="answer the questions of this file")
    add("--images", type=Path, metavar="DIR", help="folder that the `image` paths of --questions are relative to")
    add(
        "--out", type=Path, metavar="JSONL", help="file for the answers to --questions; OUT.journal keeps finished ones"
    )
    add("--max-new-tokens", type=int, default=256, help="limit per answer (default %(default)s)")
    add("--stop", action="append", default=[], help="end the answer before this string; can be repeated")
    add("--temperature", type=float, help="0: always the most likely token (default 0, or 1 with --top-k or --top-p)")
    add("--top-k", type=int, default=0, help="sample from the K most likely tokens only (default: no limit)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that have this probability together")
    add("--seed", type=int, default=0, help="the same seed samples the same answers (default %(default)s)")
    add("--batch", type=int, default=64, help="number of questions that run together (default %(default)s)")
    add("--state-dtype", choices=STATE_DTYPES, default="fp32", help="type of the stored states (default %(default)s)")
    add("--json", action="store_true", help="print each answer as a line of JSON")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Check the arguments before the model is loaded. Raises: UserError."""
    if args.temperature is None:
        args.temperature = 1.0 if args.top_k or args.top_p < 1 else 0.0
    for option, value, valid, expected in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--batch", args.batch, args.batch >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "at least 0"),
        ("--top-k", args.top_k, args.top_k >= 0, "at least 0"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "a value above 0 and at most 1"),
        ("--stop", repr(""), "" not in args.stop, "a string that is not empty"),
    ):
        if not valid:
            raise UserError(f"{option}: found {value}, expected {expected}")
    for option in ("image", "prompt") if args.questions else ("images", "out"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option}: cannot be used {'with' if args.questions else 'without'} --questions")
    if args.questions and args.out is None:
        raise UserError("--out: not given; name the file for the answers to --questions")
    check_output("--out", args.out, args.questions)
    if args.image:
        find_images([Question(question="", image=str(args.image))], Path())  # raises an error if it does not exist
    if args.image is None and IMAGE_TOKEN in (args.prompt or ""):
        raise UserError(f"--prompt: contains {IMAGE_TOKEN}, but there is no image. Add --image.")
    if not args.questions and args.prompt is None and sys.stdin is None:
        raise UserError("--prompt: not given, and the dialogue cannot be read because stdin is closed. Give --prompt.")


def _engine(args: argparse.Namespace) -> InferenceEngine:
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    model, tokenizer = load(args.model, args.device)
    state_dtype = STATE_DTYPES[args.state_dtype]
    return InferenceEngine(model, tokenizer, max_batch=args.batch, sampling=sampling, state_dtype=state_dtype)


def _answer_file(args: argparse.Namespace) -> None:
    rows = read_rows(args.questions, required=("question",))
    questions = [Question(question=row["question"], image=row["image"]) for row in rows]
    images = find_images(questions, args.images)
    print(f"loading {args.model} to answer {len(questions)} questions", flush=True)
    engine = _engine(args)
    key = answer_key(args.model, engine, args.max_new_tokens, args.stop)
    with Journal(args.out.with_name(f"{args.out.name}.journal"), key) as journal:
        answers = answer_questions(
            engine, questions, images, max_new_tokens=args.max_new_tokens, stop=args.stop, journal=journal
        )
    lines = (
        json.dumps({"input": row, "answer": answer.text, "finish_reason": answer.finish_reason}) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    )
    publish(args.out, "".join(lines).encode())
    print(f"{args.out}: {len(answers)} answers")


def _converse(args: argparse.Namespace) -> None:
    """Answer --prompt, or the questions of a dialogue, and print each answer while it is generated."""
    engine = _engine(args)
    image = read_image_file(args.image, engine.model.config.vision.image_px) if args.image else None
    dialogue = engine.dialogue(image)
    for question in _read_questions() if args.prompt is None else [clean_terminal_text(args.prompt)]:
        pieces = dialogue.ask(question, max_new_tokens=args.max_new_tokens, stop=args.stop)
        if args.json:
            print(json.dumps({"question": question, "answer": "".join(pieces).strip()}), flush=True)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _read_questions() -> Iterator[str]:
    """Read questions from stdin until an empty line, the end of the input or Ctrl-C. Bad bytes become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while line := input(prompt).removeprefix("\ufeff").strip():
            if question := clean_text(line).strip():
                yield question
            else:
                print("the question has no text; ask another one", file=sys.stderr, flush=True)
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()


if __name__ == "__main__":
    run_cli(main)
