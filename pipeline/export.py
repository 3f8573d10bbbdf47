"""Export a checkpoint as one folder that this project and transformers load: weights, code, tokenizer and model card.

    python -m pipeline.export runs/v2 models/v2                                 # the newest intact checkpoint
    python -m pipeline.export runs/v2 models/v2 --dtype bf16                    # half the size, for publishing
    python -m pipeline.export runs/v2 models/v2 --step 9000 --with-alignment
    python -m pipeline.export runs/v2 models/v2 --language-model models/v2-lm   # also the language model alone
    python -m pipeline.export runs/v2 models/v2 data.shards=/moved/shards       # if the shards were moved
    python -m pipeline.export --untrained pipeline/recipes/demo.toml models/start data.shards=SHARDS

The tokenizer is taken from the shards, which must be the ones that the run was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError, run_cli
from model.transformers_layout import save_language_model
from model.vision import Towers
from model.weights import save_model
from pipeline.checkpoint.folder import CHECKPOINTS, folder_name, list_steps
from pipeline.checkpoint.layout import full_state
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.verify import find_damage
from pipeline.initial_model import check_towers_unchanged, initial_model, make_towers
from pipeline.publishing.model_card import model_card
from pipeline.publishing.tokenizer_files import language_model_files, model_files, splits_turns_equally, token_ids
from pipeline.recipe import Recipe, recipe_of_run
from pipeline.recipe import load_recipe as read_recipe
from preprocess.prompts import Tokenizer, load_tokenizer
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest
from preprocess.strict_toml import UNSET

State = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What may have been moved since a run began, by the key that gives its new place.
MOVABLE = {"data.shards": "the shards", "weights.towers": "the towers' weights", "weights.init": "the initial model"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """A model in memory, ready to be written.

    Attributes:
        recipe: Recipe of the run.
        step: Number of optimizer steps done.
        state: State dict of `Emma`.
        towers: Vision towers.
        manifest: Manifest of the shards that the run was trained on.
        tokenizer: Tokenizer of these shards.
        run: Run folder; None for a model before its first step.
    """

    recipe: Recipe
    step: int
    state: State
    towers: Towers
    manifest: Manifest
    tokenizer: Tokenizer
    run: Path | None

    def write(self, out: Path, *, with_alignment: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Write the whole model. The fusion and the decoder, which only training uses, are left out by default."""
        state = self.state
        if not with_alignment:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("alignment.")}
        files = model_files(self.tokenizer, self.recipe.config)
        card = model_card(self.recipe, self.manifest, step=self.step, run=self.run, dtype=dtype)
        save_model(
            out,
            config=self.recipe.config,
            state=state,
            towers=self.towers,
            tokenizer_json=files.pop("tokenizer.json"),
            extra=self.origin(),
            ids=token_ids(self.tokenizer),
            dtype=dtype,
            files={**files, "README.md": card},
        )

    def write_language_model(self, out: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the language model alone, for `AutoModelForCausalLM.from_pretrained`."""
        config = self.recipe.config
        state = {name.removeprefix("llm."): tensor for name, tensor in self.state.items() if name.startswith("llm.")}
        files = language_model_files(self.tokenizer, config)
        save_language_model(out, config.llm, state, ids=token_ids(self.tokenizer), dtype=dtype, files=files)

    def origin(self) -> dict[str, Any]:
        """Return what config.json records about the origin of the model."""
        return {
            "step": self.step,
            "recipe": self.recipe.identity(),
            "shards_sha256": self.manifest.sha256,
            "tokenizer_sha256": self.manifest.tokenizer["sha256"],
        }


def read_checkpoint(run: Path, *, step: int | None = None, overrides: Sequence[str] = ()) -> Export:
    """Read a checkpoint of a run into memory.

    Args:
        run: Run folder.
        step: Step of the checkpoint; None: the newest intact checkpoint.
        overrides: New places of what was moved since the run began, such as `data.shards=/moved/shards`.

    Raises: UserError if there is no intact checkpoint, or if the shards or towers are not those of the run.
    """
    recipe = recipe_of_run(run, overrides)
    step = step if step is not None else newest_intact(run / CHECKPOINTS)
    folder = run / CHECKPOINTS / folder_name(step)
    if damage := find_damage(folder):
        raise UserError(f"{folder}: {damage}. Choose another --step.")
    with hint_if_moved("data.shards"):
        manifest = Manifest.load(recipe.data.shards)
        tokenizer = load_tokenizer(ShardFolder(Path(recipe.data.shards)).tokenizer)
    if manifest.sha256 != read_manifest(folder)["shards_sha256"]:
        raise UserError(
            f"{recipe.data.shards}: not the shards that {run} was trained on. Give their folder as data.shards=DIR."
        )
    with hint_if_moved("weights.init" if recipe.weights.init else "weights.towers"):
        towers = make_towers(recipe)
    check_towers_unchanged(run / "weights.json", towers)
    state = full_state(folder)
    check_state(state, recipe.config, folder)
    return Export(recipe=recipe, step=step, state=state, towers=towers, manifest=manifest, tokenizer=tokenizer, run=run)


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    with_alignment: bool = False,
    overrides: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> int:
    """Export a checkpoint of a run to `out` and return its step. `read_checkpoint` explains the arguments."""
    export = read_checkpoint(run, step=step, overrides=overrides)
    export.write(out, with_alignment=with_alignment, dtype=dtype)
    return export.step


def export_untrained(recipe: Recipe, out: Path, *, with_alignment: bool = False) -> None:
    """Export the initial model, before any training step."""
    read_untrained(recipe).write(out, with_alignment=with_alignment)


def read_untrained(recipe: Recipe) -> Export:
    """Build the initial model, before any training step."""
    if recipe.data.shards is UNSET:
        raise UserError("data.shards is not set; add data.shards=… to the command: the shards' tokenizer is exported")
    manifest = Manifest.load(recipe.data.shards)
    emma, towers, _ = initial_model(recipe)
    return Export(
        recipe=recipe,
        step=0,
        state=emma.state_dict(),
        towers=towers,
        manifest=manifest,
        tokenizer=load_tokenizer(ShardFolder(Path(recipe.data.shards)).tokenizer),
        run=None,
    )


@contextmanager
def hint_if_moved(key: str) -> Iterator[None]:
    """Add to a user error that the file may have been moved, and how to give its new place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}. If you moved {MOVABLE[key]}, add {key}=NEW_PLACE.") from None


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
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"recipe overrides; for a run only {', '.join(MOVABLE)}, to give the new place of what was moved",
    )
    parser.add_argument("--untrained", action="store_true", help="export the initial model, before any training step")
    parser.add_argument("--step", type=int, help="export this checkpoint (default: the newest intact checkpoint)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="type of the exported weights (default %(default)s, exact)"
    )
    parser.add_argument(
        "--language-model",
        type=Path,
        metavar="DIR",
        help="also write the language model alone to DIR, for AutoModelForCausalLM of transformers",
    )
    parser.add_argument(
        "--with-alignment", action="store_true", help="keep the fusion and the decoder, which only training uses"
    )
    args = parser.parse_args()
    if args.language_model and args.language_model.resolve() == args.out.resolve():
        raise UserError(f"--language-model {args.out}: is the folder of the whole model. Choose another folder.")
    if args.untrained:
        export = read_untrained(read_recipe(args.source, args.overrides, planning=True))
    else:
        if other := [word for word in args.overrides if word.partition("=")[0] not in MOVABLE]:
            raise UserError(
                f"{' '.join(other)}: a run is exported as it was trained. Only {', '.join(MOVABLE)} may be given."
            )
        export = read_checkpoint(Path(args.source), step=args.step, overrides=args.overrides)
    if not splits_turns_equally(export.tokenizer):
        print("note: with this tokenizer, transformers tokenizes dialogues of several turns differently", flush=True)
    export.write(args.out, with_alignment=args.with_alignment, dtype=DTYPES[args.dtype])
    print(f"{args.out}: exported {args.source}, {'untrained' if args.untrained else f'at step {export.step}'}")
    if args.language_model:
        export.write_language_model(args.language_model, dtype=DTYPES[args.dtype])
        print(f"{args.language_model}: exported the language model for AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    run_cli(main)
