"""The DeepSpeed engine, built from a model, a recipe and a DeepSpeed JSON.

The JSON sets memory and communication options; all other settings come from the recipe.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from model.emma import Emma, Losses
from model.errors import UserError, did_you_mean, first_line
from pipeline.config import REPOSITORY
from pipeline.distributed.ranks import Ranks
from pipeline.optimizer import build_optimizer
from pipeline.recipe import Recipe

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
MESH_KEYS = ("sequence_parallel_size", "data_parallel_size")  # not recorded by `_deepspeed_keys`
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


def init_distributed(ranks: Ranks, *, fake: bool = False) -> None:
    """Join the process group. Must be called once on every rank.

    Args:
        fake: simulate the other ranks, for a dry run of rank 0 alone.
    """
    import deepspeed

    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        # Otherwise DeepSpeed compiles a shared-memory operator, which takes 20 s and needs a compiler; gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=0, world_size=ranks.world_size, store=FakeStore())
    elif ranks.world_size == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(ranks.backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=ranks.backend, verbose=False)


def build_engine(emma: Emma, recipe: Recipe, ranks: Ranks) -> Engine:
    """Build a DeepSpeed engine, which shards the parameters of `emma` and broadcasts rank 0's values to all ranks."""
    import deepspeed

    emma.llm.segment_layers, emma.llm.keep_layers = recipe.engine.segment_layers, recipe.engine.keep_layers
    config = compose_config(recipe, ranks.world_size)
    if config.get("zero_optimization", {}).get("stage") == 3:
        # A mixer reads its children's weights directly, which bypasses their gathering hooks. So gather it whole.
        deepspeed.utils.set_z3_leaf_modules(
            emma, sorted({type(m) for m in emma.mixers()}, key=lambda kind: kind.__name__)
        )
    optimizer = build_optimizer(emma, recipe.optim, fused=ranks.device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=emma, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def compose_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Combine the DeepSpeed JSON with the recipe's settings.

    Raises: UserError if DeepSpeed would reject or ignore a setting, or if the JSON has a setting that the recipe owns.
    """
    path = _config_path(recipe.engine.ds_config)
    config = _read_config(path)
    rows_per_pass = recipe.optim.micro_batch * world_size
    if recipe.optim.global_batch % rows_per_pass:
        raise UserError(
            f"optim.global_batch {recipe.optim.global_batch} is not a multiple of {world_size} ranks × "
            f"optim.micro_batch {recipe.optim.micro_batch}; change one of the three"
        )
    composed = {
        **config,
        **PRECISION[recipe.engine.precision],
        "train_micro_batch_size_per_gpu": recipe.optim.micro_batch,
        "gradient_accumulation_steps": recipe.optim.global_batch // rows_per_pass,
        "gradient_clipping": recipe.optim.clip,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
    }
    _check_values(path, composed)
    return composed


def _read_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"engine.ds_config: {path}: not a readable DeepSpeed JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"engine.ds_config: {path}: found a {type(config).__name__}, expected an object")
    for key in OWNED_BY_RECIPE:
        if key in config:
            raise UserError(
                f"engine.ds_config: {path}: sets {key!r}, which the recipe owns ([optim] and [engine]); "
                f"remove it from the JSON"
            )
    _check_keys(path, config)
    _check_zero(path, config.get("zero_optimization"))
    return config


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    """Reject unknown keys, because DeepSpeed silently ignores them."""
    known = _deepspeed_keys()
    for key in sorted(config.keys() - known):
        hint = did_you_mean(key, known.difference(OWNED_BY_RECIPE))
        raise UserError(f"engine.ds_config: {path}: DeepSpeed does not know the key {key!r}{hint}")


@functools.cache
def _deepspeed_keys() -> frozenset[str]:
    """Return the top-level keys that DeepSpeed reads.

    DeepSpeed has no list of its keys, so this function builds a config from a dict that records which keys are read.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(recorder := _RecordingDict(train_micro_batch_size_per_gpu=1))
    return frozenset(recorder.keys_read).union(MESH_KEYS)


class _RecordingDict(dict[str, Any]):
    """A dict that records which keys are looked up.

    A shallow copy adds to the same `keys_read`. This is necessary because DeepSpeed reads a shallow copy.
    """

    def __init__(self, **values: Any):
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.keys_read.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # so that `key in config.keys()` is recorded too


def _check_values(path: Path, config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except Exception as error:  # its errors have no common base class
        reason = "; ".join(_pydantic_messages(error)) or first_line(error)
        raise UserError(f"engine.ds_config: {path}: rejected by DeepSpeed: {reason}") from None


def _check_zero(path: Path, zero: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not isinstance(zero, dict) or zero.get("stage") not in ZERO_STAGES:
        found = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(f"engine.ds_config: {path}: zero_optimization.stage is {found!r}, expected 1, 2 or 3")
    if "offload_optimizer" in zero:
        # `clear_gradients` does not reach offloaded gradients, so they would be stale.
        raise UserError(
            f"engine.ds_config: {path}: zero_optimization.offload_optimizer is not supported; remove it "
            f"(`python -m pipeline.describe RECIPE` shows the memory per GPU)"
        )
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's ValidationError
        reason = "; ".join(_pydantic_messages(error))
        raise UserError(f"engine.ds_config: {path}: zero_optimization: {reason or error}") from None


def _pydantic_messages(error: Exception) -> list[str]:
    """Return one line per error of a pydantic exception, and none for any other exception."""
    return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in getattr(error, "errors", list)()]


def _config_path(name: str) -> Path:
    """Look up a relative path in the working folder, then in the checkout, so that a recipe works from any folder."""
    return Path(name) if Path(name).exists() else REPOSITORY / name
