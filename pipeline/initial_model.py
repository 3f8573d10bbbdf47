"""The model before its first step: initialised from the seed, pretrained parts put in, towers beside it."""

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
    """The whole model on the CPU in fp32, and what was loaded, from where. Raises: UserError."""
    torch.manual_seed(recipe.seed)
    emma = Emma(recipe.config)
    source = llm_source(recipe)
    loaded = load_language_model(emma, source) if source else RANDOM
    towers = make_towers(recipe)
    return emma, towers, {"llm": loaded, "towers": towers.loaded or RANDOM}


def empty_model(config: EmmaConfig) -> Emma:
    """The same modules with memory but without values, for ranks that will receive the main rank's."""
    with torch.device("meta"):
        emma = Emma(config)
    return emma.to_empty(device="cpu")


def make_towers(recipe: Recipe) -> Towers:
    return Towers(recipe.config.vision, tower_source(recipe))


def llm_source(recipe: Recipe) -> str | None:
    """Folder or hub id of the pretrained language model, or None for random weights."""
    source = recipe.weights.llm or recipe.config.llm.weights
    return None if source == RANDOM else source


def tower_source(recipe: Recipe) -> str | None:
    """Where the towers' weights come from, or None for random ones; the small twins have no published weights."""
    published = None if any(tower.overrides for tower in recipe.config.vision.towers) else "timm"
    source = recipe.weights.towers or published
    return None if source == RANDOM else source


def refuse_other_towers(record: Path, towers: Towers) -> None:
    """The towers are frozen and in no checkpoint: a run keeps to those that its `record` names.

    Raises: UserError if these are others.
    """
    if not record.exists():
        return
    before = json.loads(record.read_text(encoding="utf-8"))["towers"]
    hashes = sorted(before.values()) if isinstance(before, dict) else []
    if hashes != sorted(towers.loaded.values()):
        raise UserError(
            f"weights.towers: the files {', '.join(towers.loaded) or RANDOM} are not those that the run began with "
            f"({record}); give those, or another run.dir to start afresh"
        )
