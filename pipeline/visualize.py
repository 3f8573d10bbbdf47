"""Draw what a trained model still sees of an image at each depth, and the image that its decoder redraws.

    python -m pipeline.visualize models/v2 --image photo.jpg --out maps
    python -m pipeline.visualize models/v2 --image photo.jpg --question "What is on the table?" --out maps
    python -m pipeline.visualize models/v2 --image photo.jpg --compare models/cobra --out maps
    python -m pipeline.visualize models/v2 --image photo.jpg --layers 0 16 32 63 --tap residual --out maps

The command writes DIR/maps.png and DIR/maps.html. The image is redrawn only if the folder has the decoder, which
`python -m pipeline.export RUN MODEL --with-alignment` keeps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.config import Tap
from model.errors import UserError, run_cli
from model.weights import LoadedModel
from pipeline.figures.image_maps import ImageMaps
from pipeline.figures.maps import draw_models
from pipeline.inference.engine import InferenceEngine, load
from pipeline.visualization.page import write_page
from pipeline.visualization.states import default_layers, look_inside, redraws_pixels
from preprocess.images.codec import read_image_file

MAX_NEW_TOKENS = 128


def visualize(
    folder: Path, image: Path, *, layers: Sequence[int] | None, tap: Tap, question: str | None, device: str
) -> ImageMaps:
    """Load a model and return its maps of an image file, with its answer to the question if there is one."""
    model, tokenizer = load(folder, device)
    pixels = read_image_file(image, model.config.vision.image_px)
    chosen = default_layers(model.config) if layers is None else check_layers(layers, model, folder)
    if not redraws_pixels(model.config):
        print(f"{folder}: {_no_decoder(model)}, so the image is not redrawn", file=sys.stderr)
    answer = ""
    if question:
        engine = InferenceEngine(model, tokenizer)
        answer = engine.complete([engine.request(question, pixels, max_new_tokens=MAX_NEW_TOKENS)])[0].text
    return look_inside(model, pixels, chosen, tap=tap, title=str(folder), answer=answer)


def _no_decoder(model: LoadedModel) -> str:
    if model.config.alignment is None:
        return "this folder has no decoder (export it with --with-alignment, unless the model was trained without one)"
    return f"the decoder of this model predicts {model.config.alignment.target.replace('_', ' ')}, not pixels"


def check_layers(layers: Sequence[int], model: LoadedModel, folder: Path) -> list[int]:
    """Return the distinct layers in increasing order. Raises: UserError if the model does not have all of them."""
    last = model.config.llm.num_layers - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise UserError(f"--layers: {folder} has no layer {layer} (expected 0 to {last}). Give other layers.")
    return sorted(set(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder written by pipeline.export")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write maps.png and maps.html to"
    )
    parser.add_argument("--question", help="also answer this question (the maps do not depend on it)")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER", help="folder of a second model to show below the first"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layers, from 0 (default: the tapped layers and others)"
    )
    parser.add_argument(
        "--tap",
        choices=("mixer", "residual"),
        default="mixer",
        help="state of a layer: the output of its mixer, or the residual stream after it (default %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: found a file, expected a folder. Choose another name.")
    folders = [args.model, *([args.compare] if args.compare else [])]
    options = {"layers": args.layers, "tap": args.tap, "question": args.question, "device": args.device}
    models = [visualize(folder, args.image, **options) for folder in folders]
    args.out.mkdir(parents=True, exist_ok=True)
    draw_models(models, args.out / "maps.png", question=args.question)
    write_page(models, args.out / "maps.html", image_name=args.image.name, question=args.question)
    print(f"{args.out}: maps.png, maps.html")


if __name__ == "__main__":
    run_cli(main)
