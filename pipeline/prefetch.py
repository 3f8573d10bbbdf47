"""Fetch what a recipe needs, on a login node, so that compute nodes run without network.

    python -m pipeline.prefetch pipeline/recipes/emma_v2.toml
    python -m pipeline.prefetch pipeline/recipes/emma_v1.toml weights.llm=/models/zephyr      # checks the folder

Downloads land in the hub's cache (HF_HOME): let the compute nodes see the same, and set HF_HUB_OFFLINE=1 there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from model.errors import UserError, run_cli
from model.tensors import open_published
from model.vision import HUB, Towers, hub_file
from model.weights import hub_folder
from pipeline.flops import GIB
from pipeline.initial_model import RANDOM, llm_source, tower_source
from pipeline.recipe import Recipe, load_recipe
from preprocess.prompts import load_tokenizer


def needs(recipe: Recipe) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """(part, where from, how to get it, which tells what there is). Getting raises UserError."""
    llm, towers = llm_source(recipe), tower_source(recipe)
    tokenizer = recipe.data.tokenizer or recipe.config.tokenizer
    if llm:
        yield "language model", llm, lambda: language_model(recipe, llm)
    if towers == HUB:
        for tower in recipe.config.vision.towers:
            yield f"tower {tower.name}", tower.timm_name, lambda tower=tower: _size([hub_file(tower)])  # type: ignore[misc]
    elif towers:
        yield "towers", towers, lambda: _size([Path(path) for path in Towers(recipe.config.vision, towers).loaded])
    if tokenizer:
        yield "tokenizer", tokenizer, lambda: f"{load_tokenizer(tokenizer).vocab_size} entries"


def _fetch(part: str, source: str, get: Callable[[], str]) -> str:
    """Says what there is, or gives back why it is not to be had."""
    try:
        print(f"{part:<16} {source}: {get()}", flush=True)
    except UserError as error:
        return str(error)
    return ""


def language_model(recipe: Recipe, source: str, cached: bool = False) -> str:
    """Fetches it, and sees whether it is this recipe's: a file of another model is found here, not on a GPU."""
    folder = Path(source) if Path(source).is_dir() else hub_folder(source, cached)
    files, rows = open_published(folder), recipe.config.llm.vocab_size
    embedding = next((files[name] for name in files if "embedding" in name), None)
    if embedding is None or embedding.shape[0] != rows:
        found = "no embedding" if embedding is None else f"an embedding of {embedding.shape[0]} rows"
        raise UserError(f"{folder}: found {found}, model {recipe.model!r} needs one of {rows}")
    return _size(files.paths)


def _size(paths: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / GIB:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    parts = list(needs(recipe))
    missing = [error for error in (_fetch(*part) for part in parts) if error]
    if missing:
        raise UserError(f"{len(missing)} of {len(parts)} parts are not to be had:\n  " + "\n  ".join(missing))
    print(f"{args.recipe}: everything is here" if parts else f"{args.recipe}: needs nothing: {RANDOM} weights")


if __name__ == "__main__":
    run_cli(main)
