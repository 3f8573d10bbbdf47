"""Ask a trained model about an image.

python -m pipeline.generate MODEL --image photo.jpg --prompt "What colour is the car?"
python -m pipeline.generate MODEL --prompt "Name three rivers."                        # without an image
python -m pipeline.generate MODEL --image photo.jpg                                    # a dialogue, until an empty line
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model.errors import UserError, run_cli
from pipeline.inference.engine import InferenceEngine, load
from preprocess.images.codec import read_image_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder written by pipeline.export")
    parser.add_argument("--image", type=Path, help="image file to ask about")
    parser.add_argument("--prompt", help="one question; without it, start a dialogue in the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="limit per answer (default %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: found {args.max_new_tokens}, expected at least 1")
    model, tokenizer = load(args.model, args.device)
    image = read_image_file(args.image, model.config.vision.image_px) if args.image else None
    dialogue = InferenceEngine(model, tokenizer).dialogue(image)
    for question in [args.prompt] if args.prompt is not None else iter(_ask_user, ""):
        for piece in dialogue.ask(question, max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
        print(flush=True)


def _ask_user() -> str:
    """Read one question from the terminal. Return an empty string at the end of the input or on Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


if __name__ == "__main__":
    run_cli(main)
