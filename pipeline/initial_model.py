"""The model before its first step: random weights from the seed, pretrained parts, and the frozen towers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError
from model.tensors import load_into
from model.vision import Towers
from model.weights import TIED, ExportedFolder, load_language_model, open_exported
from pipeline.recipe import Recipe

RANDOM = "random"


def initial_model(recipe: Recipe) -> tuple[Emma, Towers, dict[str, Any]]:
    """Build the model on the CPU in fp32. Return it with its towers and a record of the files that were loaded.

    Raises: UserError if a pretrained part is missing or does not fit.
    """
    torch.manual_seed(recipe.seed)
    emma = Emma(recipe.config)
    loaded: Any = RANDOM
    if recipe.weights.init:
        loaded = _load_exported(emma, recipe)
    elif source := llm_source(recipe):
        loaded = load_language_model(emma, source)
    towers = make_towers(recipe)
    return emma, towers, {"llm": loaded, "towers": towers.loaded or RANDOM}


def _load_exported(emma: Emma, recipe: Recipe) -> dict[str, Any]:
    """Load the weights of the exported model that `weights.init` gives. Return their source and sha256.

    If only one of both models has an alignment, the alignment of `emma` keeps its random weights.
    """
    exported = open_init(recipe)
    ignore = {TIED}
    if emma.alignment is None or exported.config.alignment is None:
        ignore |= {name for name in (*emma.state_dict(), *exported.emma) if name.startswith("alignment.")}
    load_into(emma, exported.emma, source=str(exported.folder), ignore=ignore)
    return {"source": str(exported.folder), "sha256": recipe.init_sha256()}


def open_init(recipe: Recipe) -> ExportedFolder:
    """Open the exported model that `weights.init` gives.

    Raises: UserError if there is no such model, or if its architecture is not that of the recipe's preset.
    """
    assert recipe.weights.init is not None
    try:
        exported = open_exported(Path(recipe.weights.init))
    except UserError as error:
        raise UserError(f"weights.init: {error}") from None
    found, expected = _architecture(exported.config), _architecture(recipe.config)
    if exported.config.alignment is None or recipe.config.alignment is None:  # then no alignment is loaded
        found["alignment"] = expected["alignment"] = None
    for name, value in expected.items():
        if found[name] != value:
            raise UserError(
                f"weights.init: {exported.folder}: does not fit the preset {recipe.model!r}: {name} is different "
                f"(found {found[name]}, expected {value}). Set model to a preset with the architecture of "
                f"{exported.config.name!r}"
                + (", or export the model without its decoder." if name == "alignment" else ".")
            )
    return exported


def _architecture(config: EmmaConfig) -> dict[str, Any]:
    """Return the settings that two models must share so that one can start from the weights of the other."""
    alignment = config.alignment and replace(config.alignment, weight=0.0)  # the weight may be changed
    return {
        **{f"vision.{name}": value for name, value in asdict(config.vision).items()},
        **{f"llm.{name}": value for name, value in asdict(config.llm).items() if name != "weights"},
        "template": config.template,
        "cross_scan": config.cross_scan,
        "alignment": alignment,
    }


def empty_model(config: EmmaConfig) -> Emma:
    """Build the model with uninitialised weights, for ranks that receive their weights later."""
    with torch.device("meta"):
        emma = Emma(config)
    return emma.to_empty(device="cpu")


def make_towers(recipe: Recipe) -> Towers:
    """Load the frozen towers. Raises: UserError if their weights are missing or do not fit."""
    if recipe.weights.init is None:
        return Towers(recipe.config.vision, tower_source(recipe))
    towers = open_init(recipe).load_towers()
    towers.loaded = {recipe.weights.init: str(recipe.init_sha256())}
    return towers


def llm_source(recipe: Recipe) -> str | None:
    """Return the folder or hub id of the pretrained language model, or None for random weights or `weights.init`."""
    if recipe.weights.init:
        return None
    source = recipe.weights.llm or recipe.config.llm.weights
    return None if source == RANDOM else source


def tower_source(recipe: Recipe) -> str | None:
    """Return the source of the towers' weights. None: random weights, as in the tiny presets, or `weights.init`."""
    if recipe.weights.init:
        return None
    published = None if any(tower.overrides for tower in recipe.config.vision.towers) else "timm"
    source = recipe.weights.towers or published
    return None if source == RANDOM else source


def check_towers_unchanged(record: Path, towers: Towers) -> None:
    """Check that the towers were loaded from the files that `record` lists, because checkpoints contain no towers.

    Raises: UserError if the towers come from other files.
    """
    if not record.exists():
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))["towers"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record}: is damaged; delete it, so that this launch records its weights again") from None
    hashes = sorted(before.values()) if isinstance(before, dict) else []
    if hashes != sorted(towers.loaded.values()):
        raise UserError(
            f"weights.towers: {', '.join(towers.loaded) or RANDOM}: not the files that the run began with ({record}). "
            "Use the original files, or another run.dir to start a new run."
        )
