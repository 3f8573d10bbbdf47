"""Run one rank of a larger job on a single GPU, to see which micro-batch sizes fit and how fast they are.

    python -m pipeline.dry_run pipeline/recipes/emma_v2.toml --ranks 8 --memory-gib 39
    python -m pipeline.dry_run pipeline/recipes/emma_v1.toml --micro-batches 8 16 32 engine.segment_layers=4
    python -m pipeline.dry_run pipeline/recipes/emma_v2.toml --micro-batches 16 engine.memory_gib=36
    python -m pipeline.dry_run pipeline/recipes/emma_v2.toml model=tiny_v2 engine.device=cpu   # rehearse on a CPU

A fake process group replaces the other ranks, so memory and computation are those of one real rank, communication takes
no time, and the computed values are meaningless. If the recipe's shards exist, every text is as long as their longest
text. Otherwise every text has --text-tokens tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import IGNORE_INDEX
from model.emma import Emma
from model.errors import UserError, run_cli
from model.kernels.dispatch import kernel_report
from model.vision import Towers
from pipeline.activation_memory import fit_kept_layers
from pipeline.data.batch import GlobalBatch, MicroBatch
from pipeline.data.by_source import BatchSources
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import Engine, build_engine, init_distributed
from pipeline.flops import GIB, count_parameters, flops_per_sample
from pipeline.recipe import Recipe, load_recipe
from pipeline.step import optimizer_step
from pipeline.step_profile import StepProfile, profile_step
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import load_index
from preprocess.strict_toml import UNSET

SUPERVISED_SHARE = 0.5  # assumed share of the text tokens that are supervised
WARM_UP_STEPS, TIMED_STEPS = 2, 3
MAX_CPU_PARAMETERS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Measurements of one micro-batch size.

    step_s          seconds for forward, backward and update of one micro-batch; None if it ran out of memory
    *_gib           peak of allocated GPU memory in each phase
    useful_tflops   TFLOP/s, recomputation not counted
    profile         GPU time of a further step, if asked for
    """

    micro_batch: int
    step_s: float | None
    keep_layers: int = 0
    forward_gib: float = 0.0
    backward_gib: float = 0.0
    update_gib: float = 0.0
    useful_tflops: float = 0.0
    profile: StepProfile | None = None

    @property
    def peak_gib(self) -> float:
        return max(self.forward_gib, self.backward_gib, self.update_gib)


def try_sizes(
    recipe: Recipe, sizes: list[int], *, world_size: int, memory_gib: float, text_tokens: int, profile: bool = False
) -> list[Trial]:
    """Try micro-batch sizes in the given order until one does not fit. Call this once per process."""
    ranks = fake_ranks(recipe, world_size)
    recipe = replace(recipe, optim=replace(recipe.optim, micro_batch=sizes[0], global_batch=sizes[0] * world_size))
    with torch.device(ranks.device):
        emma = Emma(recipe.config)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    towers = Towers(recipe.config.vision).to(ranks.device, dtype)
    engine = build_engine(emma, recipe, ranks)
    limit_memory(ranks.device, memory_gib)
    trials = []
    for size in sizes:
        batch = random_batch(recipe, size, text_tokens, world_size)
        trials.append(try_size(engine, towers, recipe, batch, text_tokens, profile=profile))
        if trials[-1].step_s is None:
            break
    return trials


def fake_ranks(recipe: Recipe, world_size: int) -> Ranks:
    """Make this process rank 0 of `world_size` ranks. The other ranks do not exist."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks, fake=True)
    return ranks


def refuse_full_size_on_cpu(recipe: Recipe) -> None:
    """Raise UserError for a large model without a GPU, because it would take hours and say nothing about a GPU."""
    device = "cuda" if torch.cuda.is_available() and recipe.engine.device != "cpu" else "cpu"
    parameters = count_parameters(recipe.config).trainable
    if device == "cpu" and parameters > MAX_CPU_PARAMETERS:
        tiny = f"tiny_{recipe.model.removeprefix('emma_')}"
        found = "engine.device is cpu" if recipe.engine.device == "cpu" else "torch finds no GPU"
        raise UserError(
            f"{recipe.model} has {parameters / 1e9:.1f} billion trainable parameters, but {found}; run this command on "
            f"a GPU node, or rehearse it on the CPU with a tiny model: add model={tiny} engine.device=cpu"
        )


def limit_memory(device: torch.device, gib: float) -> None:
    """Limit torch's allocator, so that a large GPU runs out of memory where a smaller one would."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        share = gib * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def try_size(
    engine: Engine, towers: Towers, recipe: Recipe, batch: GlobalBatch, text_tokens: int, *, profile: bool = False
) -> Trial:
    """Run several steps of one micro-batch. Return the median step time and the memory peak of each phase."""
    size = len(batch.micro_batches[0].tokens)
    peaks = {"forward": 0.0, "backward": 0.0, "update": 0.0}
    times = []
    try:
        if recipe.engine.memory_gib:
            print(fit_kept_layers(engine, towers, recipe, batch.micro_batches[0], recipe.engine.memory_gib), flush=True)
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            begun = time.perf_counter()
            with measured_phases(engine, peaks):
                optimizer_step(engine, towers, recipe, batch, lr=0.0)
            synchronize(engine.device)
            times.append(time.perf_counter() - begun)
        profiled = profile_step(lambda: optimizer_step(engine, towers, recipe, batch, lr=0.0)) if profile else None
    except torch.OutOfMemoryError:
        return Trial(micro_batch=size, step_s=None)
    step_s = sorted(times[WARM_UP_STEPS:])[TIMED_STEPS // 2]
    supervised, kept = int(text_tokens * SUPERVISED_SHARE), engine.module.llm.keep_layers
    flops = flops_per_sample(recipe.config, text_tokens, supervised, recipe.engine.segment_layers, kept)
    gib = {f"{phase}_gib": value for phase, value in peaks.items()}
    tflops = flops.useful * size / step_s / 1e12
    return Trial(micro_batch=size, step_s=step_s, keep_layers=kept, useful_tflops=tflops, profile=profiled, **gib)


class measured_phases:  # noqa: N801 (reads as a verb in its with statement)
    """Record the peak of allocated memory in the forward pass, the backward pass and the update of a step."""

    def __init__(self, engine: Engine, peaks: dict[str, float]):
        self.engine, self.peaks = engine, peaks

    def __enter__(self) -> None:
        self.originals = {name: getattr(self.engine, name) for name in ("backward", "step")}
        reset_peak()
        vars(self.engine)["backward"] = self._recording("forward", self.originals["backward"])
        vars(self.engine)["step"] = self._recording("backward", self.originals["step"])

    def __exit__(self, *_: object) -> None:
        self._record("update")
        vars(self.engine).update(self.originals)

    def _recording(self, phase: str, then: Any) -> Any:
        def recorded(*arguments: Any) -> Any:
            self._record(phase)
            return then(*arguments)

        return recorded

    def _record(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks[phase], peak_gib())
        reset_peak()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(recipe: Recipe, size: int, text_tokens: int, world_size: int) -> GlobalBatch:
    """Return a global batch of random images and tokens, in which the second half of each text is supervised."""
    config = recipe.config
    tokens = torch.randint(2, config.llm.vocab_size, (size, text_tokens))
    targets = tokens.clone()
    targets[:, : text_tokens - int(text_tokens * SUPERVISED_SHARE)] = IGNORE_INDEX
    pixels = torch.randint(0, 256, (size, 3, config.vision.image_px, config.vision.image_px), dtype=torch.uint8)
    micro_batch = MicroBatch(tokens=tokens, targets=targets, pixels=pixels, real=torch.ones(size, dtype=torch.bool))
    samples = size * world_size
    return GlobalBatch(
        step=0,
        micro_batches=[micro_batch],
        ids=np.arange(samples),
        samples=samples,
        images=samples,
        supervised_tokens=samples * int(text_tokens * SUPERVISED_SHARE),
        tokens=samples * (text_tokens + config.vision.num_patches),
        padding_ratio=0.0,
        wait_s=0.0,
        sources=BatchSources(
            rows=torch.zeros(1, size, dtype=torch.int64),
            samples=np.array([samples]),
            supervised_tokens=np.array([samples]),
        ),
    )


def longest_text(recipe: Recipe, default: int) -> int:
    """Return the number of tokens of the longest text in the recipe's shards, or `default` if there are no shards."""
    if recipe.data.shards is UNSET or not ShardFolder(Path(recipe.data.shards)).manifest.exists():
        return default
    return int(load_index(recipe.data.shards).column("num_text_tokens").to_numpy().max())


def table(trials: list[Trial], memory_gib: float) -> str:
    lines = ["micro-batch   kept layers   s/step   useful TFLOP/s   peak GiB: forward  backward  update"]
    for trial in trials:
        if trial.step_s is None:
            lines.append(f"{trial.micro_batch:>11}   does not fit into {memory_gib:.0f} GiB")
            continue
        lines.append(
            f"{trial.micro_batch:>11}   {trial.keep_layers:>11}   {trial.step_s:6.3f}   {trial.useful_tflops:14.1f}   "
            f"{trial.forward_gib:17.1f}  {trial.backward_gib:8.1f}  {trial.update_gib:6.1f}"
        )
    fitting = [trial.micro_batch for trial in trials if trial.step_s is not None]
    lines += [profile_line(trial) for trial in trials if trial.profile]
    lines.append(
        f"largest that fits: {max(fitting)}" if fitting else "none fits: recompute more layers, or use more ranks"
    )
    return "\n".join(lines)


def profile_line(trial: Trial) -> str:
    assert trial.profile is not None
    kinds = ", ".join(f"{kind} {1000 * seconds:.0f}" for kind, seconds in trial.profile.seconds_by_kind.items())
    busy, kernels = 1000 * trial.profile.busy_s, trial.profile.kernels
    return f"micro-batch {trial.micro_batch}: {kernels} kernels run for {busy:.0f} ms: {kinds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default %(default)s)"
    parser.add_argument("recipe", help="TOML file, such as pipeline/recipes/emma_v2.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as optim.lr=1e-5")
    parser.add_argument("--ranks", type=int, default=8, help=f"world size of the real job {default}")
    parser.add_argument("--memory-gib", type=float, default=39.0, help=f"GPU memory to stay below {default}")
    parser.add_argument("--text-tokens", type=int, default=295, help=f"tokens per text, without shards {default}")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", help="sizes to try (default: 1, 2, 4, … up to global_batch / ranks)"
    )
    parser.add_argument("--profile", action="store_true", help="also measure the GPU time of each kind of kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")
    args = parser.parse_intermixed_args()
    for option in ("ranks", "memory_gib", "text_tokens", "micro_batches"):
        value = getattr(args, option)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise UserError(f"--{option.replace('_', '-')}: found {value}, expected a number above 0")
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    refuse_full_size_on_cpu(recipe)
    share = max(1, recipe.optim.global_batch // args.ranks)
    sizes = args.micro_batches or [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= share]
    text_tokens = longest_text(recipe, args.text_tokens)
    if args.profile and not torch.cuda.is_available():
        raise UserError("--profile: torch finds no GPU on this machine")
    limits = {"memory_gib": args.memory_gib, "text_tokens": text_tokens}
    trials = try_sizes(recipe, sizes, world_size=args.ranks, profile=args.profile, **limits)
    device = "cuda" if torch.cuda.is_available() and recipe.engine.device != "cpu" else "cpu"
    print(
        f"{recipe.model}, rank 0 of {args.ranks}, {recipe.config.vision.num_patches} + {text_tokens} tokens; ", end=""
    )
    print(f"{kernel_report(torch.device(device))}; {recipe.engine.ds_config}, {recipe.engine.precision}, ", end="")
    print(f"activation checkpoints in segments of {recipe.engine.segment_layers} layers")
    print(table(trials, args.memory_gib))
    if args.json:
        args.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=2))


if __name__ == "__main__":
    run_cli(main)
