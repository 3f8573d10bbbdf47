"""The model before its first step: random weights from the seed, pretrained parts, and the frozen towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError
from model.vision import Towers
from model.weights import load_language_model
from pipeline.recipe import Recipe

RANDOM = "random"


def initial_model(recipe: Recipe) -> tuple[Emma, Towers, dict[str, Any]]:
    """Build the model on the CPU in fp32. Return it with its towers and a record of the files that were loaded.

    Raises: UserError if a pretrained part is missing or does not fit.
    """
    torch.manual_seed(recipe.seed)
    emma = Emma(recipe.config)
    source = llm_source(recipe)
    loaded = load_language_model(emma, source) if source else RANDOM
    towers = make_towers(recipe)
    return emma, towers, {"llm": loaded, "towers": towers.loaded or RANDOM}


def empty_model(config: EmmaConfig) -> Emma:
    """Build the model with uninitialised weights, for ranks that receive their weights later."""
    with torch.device("meta"):
        emma = Emma(config)
    return emma.to_empty(device="cpu")


def make_towers(recipe: Recipe) -> Towers:
    return Towers(recipe.config.vision, tower_source(recipe))


def llm_source(recipe: Recipe) -> str | None:
    """Return the folder or hub id of the pretrained language model, or None for random weights."""
    source = recipe.weights.llm or recipe.config.llm.weights
    return None if source == RANDOM else source


def tower_source(recipe: Recipe) -> str | None:
    """Return the source of the towers' weights, or None for random weights, as in the tiny presets."""
    published = None if any(tower.overrides for tower in recipe.config.vision.towers) else "timm"
    source = recipe.weights.towers or published
    return None if source == RANDOM else source


def check_towers_unchanged(record: Path, towers: Towers) -> None:
    """Check that the towers were loaded from the files that `record` lists, because checkpoints contain no towers.

    Raises: UserError if the towers come from other files.
    """
    if not record.exists():
        return
    before = json.loads(record.read_text(encoding="utf-8"))["towers"]
    hashes = sorted(before.values()) if isinstance(before, dict) else []
    if hashes != sorted(towers.loaded.values()):
        raise UserError(
            f"weights.towers: {', '.join(towers.loaded) or RANDOM}: not the files that the run began with ({record}). "
            "Use the original files, or another run.dir to start a new run."
        )
