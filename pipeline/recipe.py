"""Recipes: TOML files and `key=value` overrides, parsed strictly into a frozen, typed `Recipe`.

    python -m pipeline.recipe pipeline/recipes/emma_v2.toml optim.lr=1e-5            # print the resolved recipe
    python -m pipeline.recipe pipeline/recipes/emma_v2.toml --get run.dir            # print one value, for scripts

The value of an override is parsed as TOML. If the key holds text, or if the value is not valid TOML, it is used as it
is typed. Therefore a folder needs no quotes, even if its name is a number or a date. `null` means no value.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from model.config import AlignmentConfig, EmmaConfig, MambaConfig, TowerConfig, VisionConfig
from model.errors import UserError, read_error, run_cli
from model.hashing import weights_sha256
from model.presets import preset
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    WatchdogConfig,
    WeightsConfig,
)
from preprocess.strict_toml import CommandLineValue, Range, parse_table, read_toml

HOW_TO_SET = "put it into the recipe or add {key}=… to the command"
NOT_IN_IDENTITY = ("data", "checkpoint", "engine", "log", "evaluate", "watchdog", "weights", "run")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Configuration of a training run."""

    model: str
    """Preset of the model."""

    seed: int = 7
    """Seed of the initial weights and of the order of the samples."""

    steps: Annotated[int | None, Range(least=1)] = None
    """Number of optimizer steps; null: the number of steps in `data.epochs` epochs."""

    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    run: RunConfig

    @property
    def config(self) -> EmmaConfig:
        """Configuration of the model."""
        return preset(self.model)

    @property
    def align_weight(self) -> float:
        """Weight of the alignment loss relative to the text loss; 0 for a model without alignment."""
        alignment = self.config.alignment
        if alignment is None:
            return 0.0
        return alignment.weight if self.loss.align_weight is None else self.loss.align_weight

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the result of training. A run resumes only with equal settings.

        Every section of the recipe is included unless `NOT_IN_IDENTITY` names it. A key that was added after the first
        checkpoint format is left out if it has its default, so that older checkpoints can still be resumed.
        """
        settings = {key: value for key, value in _identity_of(self).items() if key not in NOT_IN_IDENTITY}
        del settings["optim"]["micro_batch"]
        settings |= {
            "epochs": self.data.epochs,
            "window": self.data.window,
            "precision": self.engine.precision,
            "architecture": _identity_of(self.config),
        }
        if self.weights.init:
            settings["init"] = self.init_sha256()
        return json.loads(json.dumps(settings))  # tuples become lists, as in a checkpoint's manifest

    def init_sha256(self) -> str | None:
        """Return the sha256 of the weights that `weights.init` gives, wherever their folder is now, or None."""
        return weights_sha256(self.weights.init) if self.weights.init else None

    def memory_settings(self) -> dict[str, Any]:
        """Return the settings that determine how much memory a rank needs, apart from the number of ranks."""
        return {"micro_batch": self.optim.micro_batch, "workers": self.data.workers, **asdict(self.engine)}

    def fingerprint(self) -> str:
        """Return the sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


FIRST_FORMAT: dict[type, str] = {  # keys of the first checkpoint format; never add to them
    Recipe: "model seed steps optim loss",
    OptimConfig: "lr betas eps weight_decay clip warmup_ratio global_batch micro_batch",
    LossConfig: "text align_weight",
    EmmaConfig: "name vision llm template alignment cross_scan tokenizer max_text_tokens",
    VisionConfig: "towers image_px patch_px",
    TowerConfig: "name timm_name width depth mean std overrides",
    MambaConfig: "kind d_model num_layers vocab_size d_state weights d_conv expand head_dim num_groups chunk_size "
    "norm_eps",
    AlignmentConfig: "taps num_values weight target tap fusion head_dim decoder_layers decoder_width decoder_kind "
    "shift",
}


def _identity_of(config: Any) -> dict[str, Any]:
    """Return a configuration's values like `asdict`, without newer keys that have their default."""
    first = next((FIRST_FORMAT[base].split() for base in type(config).__mro__ if base in FIRST_FORMAT), [])
    values = {}
    for key in fields(config):
        value = getattr(config, key.name)
        default = key.default_factory() if key.default_factory is not MISSING else key.default
        if key.name not in first and value == default:
            continue
        if is_dataclass(value):
            value = _identity_of(value)
        elif isinstance(value, tuple):
            value = [_identity_of(item) if is_dataclass(item) else item for item in value]
        values[key.name] = value
    return values


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, planning: bool = False) -> Recipe:
    """Load a recipe from a file.

    Args:
        path: TOML file; keys that it lacks have their defaults.
        overrides: Values that replace those in the file, such as `optim.lr=1e-5`.
        planning: Whether `data.shards` and `run.dir` may be absent. A key that is absent is `UNSET`.

    Raises: UserError that names the key, what was found and what is valid.
    """
    table = read_toml(Path(path), what="recipe", shipped="pipeline/recipes")
    for override in overrides:
        _override(table, override)
    may_be_unset = ("data.shards", "run.dir") if planning else ()
    recipe = parse_table(Recipe, table, str(path), may_be_unset=may_be_unset, how_to_set=HOW_TO_SET)
    _validate(recipe, str(path))
    return recipe


def recipe_of_run(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the resolved recipe that a run folder keeps, with overrides. Raises: UserError if there is none."""
    path = run / "recipe.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise read_error(error, path) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a run folder: {error}") from None
    for override in overrides:
        _override(table, override)
    return parse_table(Recipe, table, str(path))


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the table of a recipe."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"{override!r} is not an override; write key=value, as in optim.lr=1e-5")
    *sections, name = key.split(".")
    for section in sections:
        if isinstance(whole := table.get(section), CommandLineValue):  # set by an earlier override, such as optim={…}
            table[section] = whole.parse()
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{override!r}: {section!r} is a value, not a section with keys")
    table[name] = CommandLineValue(text)


def _validate(recipe: Recipe, where: str) -> None:
    """Check the constraints that types and ranges cannot express."""
    for name in _empty_texts(asdict(recipe)):
        raise UserError(f"{where}: {name} is empty; give a value or leave it out (is a shell variable unset?)")
    if recipe.engine.memory_gib and not recipe.engine.segment_layers:
        raise UserError(
            f"{where}: engine.memory_gib has no effect with engine.segment_layers=0, which turns recomputation off; "
            "leave one of them out"
        )
    if recipe.evaluate.draw_every_steps and recipe.evaluate.shards is None:
        raise UserError(
            f"{where}: evaluate.draw_every_steps needs held-out images; set evaluate.shards, or leave the key out"
        )
    if recipe.weights.init and (recipe.weights.llm or recipe.weights.towers):
        raise UserError(f"{where}: weights.init gives the whole model, so leave out weights.llm and weights.towers")
    try:
        preset(recipe.model)
    except ValueError as error:
        raise UserError(f"{where}: model: {error}") from None


def _empty_texts(table: dict[str, Any], section: str = "") -> Iterator[str]:
    """Yield the keys that hold empty text, which usually comes from an unset shell variable."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _empty_texts(value, f"{section}{key}.")
        elif isinstance(value, str) and not value.strip():
            yield f"{section}{key}"


def main() -> None:
    """Print a resolved recipe, or one of its values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="TOML file of the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument("--get", metavar="KEY", help="print only the value of this dotted key")
    args = parser.parse_args()
    value: Any = asdict(load_recipe(args.recipe, args.overrides))
    if args.get:
        for name in args.get.split("."):
            if not isinstance(value, dict) or name not in value:
                raise UserError(f"--get {args.get}: the recipe has no such key")
            value = value[name]
    print(value if isinstance(value, str) else json.dumps(value, indent=2))


if __name__ == "__main__":
    run_cli(main)
