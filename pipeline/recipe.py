"""Recipes: TOML plus `key=value` overrides -> one frozen, typed `Recipe`. Strict: an unknown key is an error.

    python -m pipeline.recipe pipeline/recipes/emma_v2.toml optim.lr=1e-5            # the resolved whole
    python -m pipeline.recipe pipeline/recipes/emma_v2.toml --get run.dir            # one value, for scripts

Values are TOML; what is not TOML is taken as text, so paths need no quotes; null stands for none.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import sys
import typing
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import EmmaConfig
from model.errors import UserError, run_cli
from model.presets import preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIRED, NOWHERE = "(required)", "(nowhere)"
RANGES = (
    ("steps", 1, math.inf),
    ("data.epochs", 1, math.inf),
    ("data.window", 1, math.inf),
    ("data.workers", 0, math.inf),
    ("optim.lr", 0, math.inf),
    ("optim.betas", 0, 0.999999),
    ("optim.eps", 0, math.inf),
    ("optim.weight_decay", 0, math.inf),
    ("optim.clip", 0, math.inf),
    ("optim.warmup_ratio", 0, 1),
    ("optim.global_batch", 1, math.inf),
    ("optim.micro_batch", 1, math.inf),
    ("loss.align_weight", 0, math.inf),
    ("checkpoint.every_steps", 1, math.inf),
    ("checkpoint.keep_last", 1, math.inf),
    ("checkpoint.keep_every", 0, math.inf),
    ("engine.segment_layers", 0, math.inf),
    ("engine.keep_layers", 0, math.inf),
    ("engine.memory_gib", 1e-3, math.inf),
    ("log.every_steps", 1, math.inf),
    ("evaluate.every_steps", 1, math.inf),
    ("evaluate.samples", 1, math.inf),
    ("watchdog.slow_factor", 0, math.inf),
    ("watchdog.least_s", 0, math.inf),
    ("watchdog.first_s", 1, math.inf),
)


@dataclass(frozen=True)
class DataConfig:
    """`window`: global batches that are sorted by length together; 200 keep padding and waiting below 1 %.

    `workers`: loading processes per rank.

    `tokenizer`: folder or hub id that the shards must have been made with; null: the one that the preset names.
    """

    shards: str = REQUIRED
    tokenizer: str | None = None
    epochs: int = 2
    window: int = 200
    workers: int = 2


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero; `micro_batch` is per rank and forward pass."""

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_ratio: float = 0.03
    global_batch: int = 128
    micro_batch: int = 16


@dataclass(frozen=True)
class LossConfig:
    """`text`: mean over the step's supervised tokens or over its samples' means; `align_weight`: null: the preset's."""

    text: Literal["token", "sample"] = "token"
    align_weight: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """The newest `keep_last` good ones are kept, and for ever those whose step is a multiple of `keep_every` (0: none).

    `background`: training goes on while a copy of the state is written; false: it waits.
    """

    every_steps: int = 500
    keep_last: int = 3
    keep_every: int = 0
    background: bool = True


@dataclass(frozen=True)
class EngineConfig:
    """`segment_layers`: activation checkpointing, 0 for none; `keep_layers`: the last ones, not recomputed.

    `memory_gib`: instead of `keep_layers`, as many as fit into so much of each GPU's memory, found when a run starts.
    """

    ds_config: str = "ds_configs/zero3.json"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32", "autocast"] = "bf16"
    segment_layers: int = 4
    keep_layers: int = 0
    memory_gib: float | None = None


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "emma"


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out losses while training: every `every_steps` steps on `samples` of other `shards`; null: none."""

    shards: str | None = None
    every_steps: int = 1000
    samples: int = 512


@dataclass(frozen=True)
class WatchdogConfig:
    """A step longer than `slow_factor` times the usual, and than `least_s`, ends the run, to be tried again; 0: never.

    `first_s`: what the start, each of the first steps, a save, an evaluation and wandb's end may take.
    """

    slow_factor: float = 20.0
    least_s: float = 300.0
    first_s: float = 1800.0


@dataclass(frozen=True)
class WeightsConfig:
    """Folder or hub id of the pretrained parts; null: the preset's own; "random": initialised from the seed."""

    llm: str | None = None
    towers: str | None = None


@dataclass(frozen=True)
class RunConfig:
    dir: str = REQUIRED


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run is told. `steps`: null = as many as `data.epochs` take."""

    model: str = REQUIRED
    seed: int = 7
    steps: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def config(self) -> EmmaConfig:
        return preset(self.model)

    @property
    def align_weight(self) -> float:
        """What the mean squared error of a picture counts against a text token's log-likelihood."""
        alignment = self.config.alignment
        if alignment is None:
            return 0.0
        return alignment.weight if self.loss.align_weight is None else self.loss.align_weight

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same training; a checkpoint resumes only under the same ones."""
        whole = asdict(self)
        whole["epochs"] = whole["data"]["epochs"]
        whole["window"] = whole["data"]["window"]
        for name in ("data", "run", "log", "checkpoint", "engine", "weights", "evaluate", "watchdog"):
            del whole[name]
        whole["precision"] = self.engine.precision
        del whole["optim"]["micro_batch"]
        # As JSON keeps it, so that it can be compared with what a checkpoint's manifest says.
        return json.loads(json.dumps({**whole, "architecture": asdict(self.config)}))

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = (), planning: bool = False) -> Recipe:
    """Defaults < file < overrides (`optim.lr=1e-5`). `planning`: neither shards nor a run folder need be named.

    Raises: UserError naming the key, its neighbours and its type.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the ones that ship are in pipeline/recipes") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable recipe: {error}") from None
    for override in overrides:
        _override(table, override)
    if planning:
        table = {"data": {}, "run": {}} | table
        table["data"], table["run"] = {"shards": NOWHERE} | table["data"], {"dir": NOWHERE} | table["run"]
    recipe = _build(Recipe, table, where=str(path))
    _validate(recipe, str(path))
    return recipe


def recipe_of_run(run: Path) -> Recipe:
    """The resolved recipe that a run folder keeps. Raises: UserError if there is none."""
    path = run / "recipe.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a run folder: {error}") from None
    return _build(Recipe, table, where=str(path))


def _override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"{override!r} is not an override; write key=value, as in optim.lr=1e-5")
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{override!r}: {section!r} holds a value, not further keys")
    table[name] = _parse(text)


def _parse(text: str) -> Any:
    """A TOML value if it is one; null is no value; else the text itself, so that paths need no quotes."""
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: type, table: dict[str, Any], where: str) -> Any:
    types, known = typing.get_type_hints(kind), [f.name for f in fields(kind)]
    for key in table:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r}{nearest(key, known)}; valid here: {', '.join(sorted(known))}"
            )
    return kind(**{key: _convert(types[key], value, f"{where}: {key}") for key, value in table.items()})


def nearest(key: str, known: Collection[str]) -> str:
    """The tail of a message about an unknown key, empty if no valid one is like it."""
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _convert(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where}: found {value!r}, expected a table of keys")
        return _build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(float(item) if isinstance(item, int) else item for item in value)
    if kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not _fits(kind, value):
        raise UserError(f"{where}: found {value!r}, expected {_describe(kind)}")
    return value


def _fits(kind: Any, value: Any) -> bool:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in options
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(options) and all(map(_fits, options, value))
    if options:
        return any(_fits(option, value) for option in options)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(kind: Any) -> str:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, options))
    return " or ".join(map(_describe, options)) if options else getattr(kind, "__name__", str(kind))


def _validate(recipe: Recipe, where: str) -> None:
    for section, key in (("", "model"), ("data", "shards"), ("run", "dir")):
        if getattr(getattr(recipe, section) if section else recipe, key) == REQUIRED:
            name = f"{section}.{key}".strip(".")
            raise UserError(f"{where}: {name} is not set; put it into the recipe or add {name}=… to the command")
    for name in _empty_texts(asdict(recipe)):
        raise UserError(f"{where}: {name} is empty; give a value or leave it out (is a shell variable unset?)")
    if recipe.engine.memory_gib and not recipe.engine.segment_layers:
        raise UserError(f"{where}: engine.memory_gib is for recomputation, which engine.segment_layers=0 turns off")
    try:
        preset(recipe.model)
    except ValueError as error:
        raise UserError(f"{where}: model: {error}") from None
    for name, least, most in RANGES:
        value: Any = recipe
        for key in name.split("."):
            value = getattr(value, key)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not least <= each <= most:
                upper = f" and at most {most:g}" if most < math.inf else ""
                raise UserError(f"{where}: {name}: found {each}, expected at least {least:g}{upper}")


def _empty_texts(table: dict[str, Any], section: str = "") -> Iterator[str]:
    """Keys of an empty text. It would name the root or the working folder, or be taken for null."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _empty_texts(value, f"{section}{key}.")
        elif isinstance(value, str) and not value.strip():
            yield f"{section}{key}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--get", metavar="KEY", help="print this dotted key's value alone")
    args = parser.parse_args()
    whole = asdict(load_recipe(args.recipe, args.overrides))
    if args.get:
        for name in args.get.split("."):
            if not isinstance(whole, dict) or name not in whole:
                raise UserError(f"--get {args.get}: no such key")
            whole = whole[name]
    print(whole if isinstance(whole, str) else json.dumps(whole, indent=2))


if __name__ == "__main__":
    run_cli(main)
