"""Export a checkpoint as one folder that can answer questions: safetensors, config.json and the tokenizer.

    python -m pipeline.export runs/v2 models/v2                                 # the newest intact checkpoint
    python -m pipeline.export runs/v2 models/v2 --step 9000 --with-alignment
    python -m pipeline.export runs/v2 models/v2 --language-model models/v2-lm   # also the language model alone
    python -m pipeline.export runs/v2 models/v2 data.shards=/moved/shards
    python -m pipeline.export --untrained pipeline/recipes/demo.toml models/start data.shards=SHARDS

The tokenizer is taken from the shards, which must be the ones that the run was trained on.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError, run_cli
from model.transformers_layout import save_language_model
from model.vision import Towers
from model.weights import load_model, save_model
from pipeline.checkpoint.folder import CHECKPOINTS, folder_name, list_steps
from pipeline.checkpoint.layout import full_state
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.verify import find_damage
from pipeline.initial_model import check_towers_unchanged, initial_model, make_towers
from pipeline.recipe import Recipe, recipe_of_run
from pipeline.recipe import load_recipe as read_recipe
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest
from preprocess.strict_toml import UNSET

State = dict[str, torch.Tensor]


def export_run(
    run: Path, out: Path, *, step: int | None = None, with_alignment: bool = False, shards: str | None = None
) -> int:
    """Export a checkpoint of a run to `out` and return its step.

    Args:
        step: None exports the newest intact checkpoint.
        with_alignment: keep the fusion and the decoder, which only training uses.
        shards: the folder of the shards, if they were moved since the run began.

    Raises: UserError if there is no intact checkpoint, or if the shards or towers are not those of the run.
    """
    recipe = recipe_of_run(run)
    if shards:
        recipe = replace(recipe, data=replace(recipe.data, shards=shards))
    step = step if step is not None else newest_intact(run / CHECKPOINTS)
    folder = run / CHECKPOINTS / folder_name(step)
    if damage := find_damage(folder):
        raise UserError(f"{folder}: {damage}. Choose another --step.")
    found, trained = Manifest.load(recipe.data.shards).sha256, read_manifest(folder)["shards_sha256"]
    if found != trained:
        raise UserError(
            f"{recipe.data.shards}: not the shards that {run} was trained on. Give their folder as data.shards=DIR."
        )
    towers = make_towers(recipe)
    check_towers_unchanged(run / "weights.json", towers)
    state = full_state(folder)
    check_state(state, recipe.config, folder)
    _write(out, recipe, state, towers, with_alignment=with_alignment, step=step)
    return step


def export_language_model(model: Path, out: Path) -> None:
    """Write the language model of an exported folder, with its tokenizer, in the layout of transformers."""
    loaded = load_model(model)
    save_language_model(out, loaded.config.llm, loaded.emma.llm.state_dict())
    if loaded.tokenizer is not None:
        shutil.copy(loaded.tokenizer, out / "tokenizer.json")


def export_untrained(recipe: Recipe, out: Path, *, with_alignment: bool) -> None:
    """Export the initial model, before any training step."""
    if recipe.data.shards is UNSET:
        raise UserError("data.shards is not set; add data.shards=… to the command: the shards' tokenizer is exported")
    emma, towers, _ = initial_model(recipe)
    _write(out, recipe, emma.state_dict(), towers, with_alignment=with_alignment, step=0)


def _write(out: Path, recipe: Recipe, state: State, towers: Towers, *, with_alignment: bool, step: int) -> None:
    if not with_alignment:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("alignment.")}
    manifest = Manifest.load(recipe.data.shards)
    tokenizer_json = ShardFolder(Path(recipe.data.shards)).tokenizer.read_text(encoding="utf-8")
    extra = {"step": step, "recipe": recipe.identity(), "shards_sha256": manifest.sha256}
    save_model(out, config=recipe.config, state=state, towers=towers, tokenizer_json=tokenizer_json, extra=extra)


def newest_intact(checkpoints: Path) -> int:
    """Return the newest step whose checkpoint verifies. Raises: UserError if none does."""
    refused = []
    for step in reversed(list_steps(checkpoints)):
        damage = find_damage(checkpoints / folder_name(step))
        if damage is None:
            return step
        refused.append(f"{folder_name(step)}: {damage}")
    raise UserError(f"{checkpoints}: no intact checkpoint to export{': ' if refused else ''}{'; '.join(refused)}")


def check_state(state: State, config: EmmaConfig, where: Path) -> None:
    """Check that a state has exactly the tensors of the model, with their shapes, so that no tensor is lost unnoticed.

    Raises: UserError that names the first few tensors which differ.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Emma(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        facts = ", ".join(f"{name} (found {found.get(name)}, expected {expected.get(name)})" for name in wrong[:5])
        raise UserError(f"{where}: {len(wrong)} tensors differ from the model's: {facts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder; with --untrained, a recipe file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe overrides; for a run only data.shards="
    )
    parser.add_argument("--untrained", action="store_true", help="export the initial model, before any training step")
    parser.add_argument("--step", type=int, help="export this checkpoint (default: the newest intact checkpoint)")
    parser.add_argument(
        "--language-model",
        type=Path,
        metavar="DIR",
        help="also write the language model alone to DIR, for transformers",
    )
    parser.add_argument(
        "--with-alignment", action="store_true", help="keep the fusion and the decoder, which only training uses"
    )
    args = parser.parse_args()
    if args.untrained:
        recipe = read_recipe(args.source, args.overrides, planning=True)
        export_untrained(recipe, args.out, with_alignment=args.with_alignment)
        print(f"{args.out}: exported {args.source}, untrained")
    else:
        shards = [word.removeprefix("data.shards=") for word in args.overrides if word.startswith("data.shards=")]
        if len(shards) != len(args.overrides):
            raise UserError(
                f"{' '.join(args.overrides)}: a run is exported as it was trained. Only data.shards= may be given."
            )
        step = export_run(
            Path(args.source),
            args.out,
            step=args.step,
            with_alignment=args.with_alignment,
            shards=shards[-1] if shards else None,
        )
        print(f"{args.out}: exported {args.source} at step {step}")
    if args.language_model:
        export_language_model(args.out, args.language_model)
        print(f"{args.language_model}: exported the language model for AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    run_cli(main)
