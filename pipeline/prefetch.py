"""Download what compute nodes without network access need: the weights and the tokenizer of a recipe, or benchmarks.

    python -m pipeline.prefetch pipeline/recipes/emma_v2.toml
    python -m pipeline.prefetch pipeline/recipes/emma_v1.toml weights.llm=/models/zephyr      # checks the folder
    python -m pipeline.prefetch --benchmarks /data/benchmarks                     # all data sets of pipeline.evaluate
    python -m pipeline.prefetch --benchmarks /data/benchmarks pope mme

Run it on a login node. The parts of a recipe go to the hub's cache (HF_HOME), which the compute nodes must share; set
HF_HUB_OFFLINE=1 there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from model.errors import UserError, run_cli
from model.tensors import open_published
from model.vision import HUB, Towers, hub_file
from model.weights import hub_folder
from pipeline.evaluation.benchmarks import choose
from pipeline.evaluation.download import download
from pipeline.flops import GIB
from pipeline.initial_model import RANDOM, llm_source, open_init, tower_source
from pipeline.recipe import Recipe, load_recipe
from preprocess.prompts import load_tokenizer


def required_parts(recipe: Recipe) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yield the name, the source and a download function of each part that the recipe needs.

    The function returns a description of what it downloaded, such as a size, or raises UserError.
    """
    llm, towers = llm_source(recipe), tower_source(recipe)
    tokenizer = recipe.data.tokenizer or recipe.config.tokenizer
    if recipe.weights.init:
        yield "initial model", recipe.weights.init, lambda: _size(open_init(recipe).emma.paths)
    if llm:
        yield "language model", llm, lambda: language_model(recipe, llm)
    if towers == HUB:
        for tower in recipe.config.vision.towers:
            yield f"tower {tower.name}", tower.timm_name, lambda tower=tower: _size([hub_file(tower)])  # type: ignore[misc]
    elif towers:
        yield "towers", towers, lambda: _size([Path(path) for path in Towers(recipe.config.vision, towers).loaded])
    if tokenizer:
        yield "tokenizer", tokenizer, lambda: f"{load_tokenizer(tokenizer).vocab_size} entries"


def _download(part: str, source: str, download: Callable[[], str]) -> str:
    """Download one part and print its size. Return the error message, or an empty string on success."""
    try:
        print(f"{part:<16} {source}: {download()}", flush=True)
    except UserError as error:
        return str(error)
    return ""


def language_model(recipe: Recipe, source: str, *, cached: bool = False) -> str:
    """Download the language model, and check that its embedding fits the recipe. Return the size of its files.

    Args:
        source: local folder or hub id. Nothing is downloaded for a local folder.
        cached: use only the hub's cache, and download nothing.

    Raises: UserError if the model cannot be found, or if its embedding has the wrong size. This check finds weights of
    another model already on the login node, before a GPU job starts.
    """
    folder = Path(source) if Path(source).is_dir() else hub_folder(source, cached=cached)
    files, rows = open_published(folder), recipe.config.llm.vocab_size
    embedding = next((files[name] for name in files if "embedding" in name), None)
    if embedding is None or embedding.shape[0] != rows:
        found = "no embedding" if embedding is None else f"an embedding of {embedding.shape[0]} rows"
        raise UserError(f"{folder}: found {found}, expected an embedding of {rows} rows for model {recipe.model!r}")
    return _size(files.paths)


def _size(paths: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / GIB:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="TOML file, such as pipeline/recipes/emma_v2.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as weights.llm=DIR")
    parser.add_argument(
        "--benchmarks", nargs="+", metavar=("DIR", "NAME"), help="folder for data sets, and their names (default: all)"
    )
    args = parser.parse_args()
    if bool(args.recipe) == bool(args.benchmarks):
        raise UserError("prefetch: expected either a recipe or --benchmarks DIR. See --help")
    if args.benchmarks:
        folder, *names = args.benchmarks
        download(choose(names or ["all"]), Path(folder))
        return
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    parts = list(required_parts(recipe))
    missing = [error for error in (_download(*part) for part in parts) if error]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(parts)} parts of the model cannot be downloaded and are not in the cache:\n  "
            + "\n  ".join(missing)
        )
    available = f"all {len(parts)} parts of the model are available locally"
    print(f"{args.recipe}: " + (available if parts else f"nothing to download ({RANDOM} weights)"))


if __name__ == "__main__":
    run_cli(main)
