"""Model + recipe + DeepSpeed JSON -> engine. The JSON owns memory and communication, the recipe every other number."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from model.emma import Emma, Losses
from model.errors import UserError, first_line
from pipeline.distributed.ranks import Ranks
from pipeline.optimizer import build_optimizer
from pipeline.recipe import Recipe, nearest

REPOSITORY = Path(__file__).resolve().parents[1]
OWNED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
    "data_types",
    "steps_per_print",
)
ZERO_STAGES = (1, 2, 3)
MESH = ("sequence_parallel_size", "data_parallel_size")  # DeepSpeed takes these before it looks at the rest
PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    # Summing micro-batches in bf16 would make the update depend on how the global batch was split.
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


class Engine(Protocol):
    """The part of a DeepSpeed engine that the pipeline uses. Only `pipeline/zero.py` looks into its `optimizer`."""

    module: Emma
    optimizer: Any
    param_names: Mapping[torch.nn.Parameter, str]

    @property
    def device(self) -> torch.device: ...
    def __call__(self, *arguments: Any) -> Losses: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def backward(self, loss: torch.Tensor) -> Any: ...
    def step(self) -> Any: ...
    def get_global_grad_norm(self) -> float | None: ...
    def zero_optimization_stage(self) -> int: ...


def init_distributed(ranks: Ranks, imagined: bool = False) -> None:
    """Join the process group. Every rank must call it, once. `imagined`: the other ranks are not there (dry runs)."""
    import deepspeed

    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        # DeepSpeed would compile a shared-memory operator here: 20 s and a compiler, for what gloo does too.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if imagined:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=0, world_size=ranks.world_size, store=FakeStore())
    elif ranks.world_size == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(ranks.backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=ranks.backend, verbose=False)


def build_engine(emma: Emma, recipe: Recipe, ranks: Ranks) -> Engine:
    """A DeepSpeed engine around `emma`, whose parameters become sharded. Rank 0's values reach all ranks."""
    import deepspeed

    emma.llm.segment_layers, emma.llm.keep_layers = recipe.engine.segment_layers, recipe.engine.keep_layers
    config = compose_config(recipe, ranks.world_size)
    if config.get("zero_optimization", {}).get("stage") == 3:
        # A mixer reads its children's weights past the hooks that gather them: gather it as one.
        deepspeed.utils.set_z3_leaf_modules(
            emma, sorted({type(m) for m in emma.mixers()}, key=lambda kind: kind.__name__)
        )
    optimizer = build_optimizer(emma, recipe.optim, fused=ranks.device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=emma, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def compose_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON with the recipe's numbers in it. Raises: UserError if it refuses them, or both say one thing."""
    path = _config_path(recipe.engine.ds_config)
    config = _read_config(path)
    per_pass = recipe.optim.micro_batch * world_size
    if recipe.optim.global_batch % per_pass:
        raise UserError(
            f"optim.global_batch {recipe.optim.global_batch} is not a multiple of {world_size} ranks × "
            f"optim.micro_batch {recipe.optim.micro_batch}; change one of the three"
        )
    composed = {
        **config,
        **PRECISION[recipe.engine.precision],
        "train_micro_batch_size_per_gpu": recipe.optim.micro_batch,
        "gradient_accumulation_steps": recipe.optim.global_batch // per_pass,
        "gradient_clipping": recipe.optim.clip,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
    }
    _check_values(path, composed)
    return composed


def _read_config(path: Path) -> dict[str, Any]:
    """Raises: UserError for what DeepSpeed would refuse, ignore, or do otherwise than the recipe says."""
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine.ds_config: {path}: not a readable DeepSpeed JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"engine.ds_config: {path}: found a {type(config).__name__}, expected an object")
    for key in OWNED_BY_RECIPE:
        if key in config:
            raise UserError(
                f"{path}: sets {key!r}, which the recipe owns ([optim] and [engine]); take it out of the JSON"
            )
    _check_keys(path, config)
    _check_zero(path, config.get("zero_optimization"))
    return config


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    """DeepSpeed itself passes over a section that it does not know."""
    known = _known_to_deepspeed()
    for key in sorted(config.keys() - known):
        hint = nearest(key, known.difference(OWNED_BY_RECIPE))
        raise UserError(f"engine.ds_config: {path}: DeepSpeed does not know the key {key!r}{hint}")


@functools.cache
def _known_to_deepspeed() -> frozenset[str]:
    """The keys of a JSON's top level. There is no list of them; they are those that a config is asked for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(asked := _Asked(train_micro_batch_size_per_gpu=1))
    return frozenset(asked.keys_asked).union(MESH)


class _Asked(dict[str, Any]):
    """Remembers which keys it was asked for. A copy, and DeepSpeed makes one, adds to the same memory."""

    def __init__(self, **values: Any):
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # `key in config.keys()` is a question, too


def _check_values(path: Path, config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except Exception as error:  # what it raises has no common kind
        told = "; ".join(_complaints(error)) or first_line(error)
        raise UserError(f"engine.ds_config: {path}: DeepSpeed does not take it: {told}") from None


def _check_zero(path: Path, zero: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not isinstance(zero, dict) or zero.get("stage") not in ZERO_STAGES:
        found = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(f"engine.ds_config: {path}: zero_optimization.stage is {found!r}, expected 1, 2 or 3")
    if "offload_optimizer" in zero:
        # Its gradients live elsewhere, where `clear_gradients` does not reach; and the states fit on the GPUs.
        raise UserError(f"{path}: offload_optimizer is not supported; take it out (python -m pipeline.describe RECIPE)")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        told = "; ".join(_complaints(error))
        raise UserError(f"engine.ds_config: {path}: zero_optimization: {told or error}") from None


def _complaints(error: Exception) -> list[str]:
    """Each of pydantic's, in a line."""
    return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in getattr(error, "errors", list)()]


def _config_path(name: str) -> Path:
    """As given, or relative to the checkout, so that a recipe works from any folder."""
    return Path(name) if Path(name).exists() else REPOSITORY / name
