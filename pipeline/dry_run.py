"""One rank of many on one GPU, before paying for them: does it fit, and how fast is it?

    python -m pipeline.dry_run pipeline/recipes/emma_v2.toml --ranks 8 --memory-gib 39
    python -m pipeline.dry_run pipeline/recipes/emma_v1.toml --micro-batches 8 16 32 engine.segment_layers=4
    python -m pipeline.dry_run pipeline/recipes/emma_v2.toml --micro-batches 16 engine.memory_gib=36
    python -m pipeline.dry_run pipeline/recipes/demo.toml --ranks 2 engine.device=cpu          # a rehearsal

A fake process group stands for the other ranks: memory and computation are one rank's own; the numbers computed are
meaningless, and communication takes no time. Text is as long as the longest of the recipe's shards if they exist, else
--text-tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import IGNORE_INDEX
from model.emma import Emma
from model.errors import run_cli
from model.kernels.dispatch import kernel_report
from model.vision import Towers
from pipeline.activation_memory import fit_kept_layers
from pipeline.data.by_source import BySource
from pipeline.data.loader import GlobalBatch, MicroBatch
from pipeline.distributed.ranks import Ranks, find_ranks
from pipeline.engine import Engine, build_engine, init_distributed
from pipeline.flops import GIB, flops_per_sample
from pipeline.recipe import Recipe, load_recipe
from pipeline.step import optimizer_step
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import load_index
from preprocess.strict_toml import UNSET

SUPERVISED_SHARE = 0.5  # of the text
WARM_UP, TIMED = 2, 3


@dataclass(frozen=True)
class Trial:
    """What one micro-batch size took. `step_s`: forward, backward and update of one; None: out of memory."""

    micro_batch: int
    step_s: float | None
    keep_layers: int = 0
    forward_gib: float = 0.0
    backward_gib: float = 0.0
    update_gib: float = 0.0
    useful_tflops: float = 0.0

    @property
    def peak_gib(self) -> float:
        return max(self.forward_gib, self.backward_gib, self.update_gib)


def rehearse(recipe: Recipe, world_size: int, memory_gib: float, text_tokens: int, sizes: list[int]) -> list[Trial]:
    """A trial of every micro-batch size in turn, up to the first that does not fit. Call it once in a process."""
    ranks = imagine_ranks(recipe, world_size)
    recipe = replace(recipe, optim=replace(recipe.optim, micro_batch=sizes[0], global_batch=sizes[0] * world_size))
    with torch.device(ranks.device):
        emma = Emma(recipe.config)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    towers = Towers(recipe.config.vision).to(ranks.device, dtype)
    engine = build_engine(emma, recipe, ranks)
    limit_memory(ranks.device, memory_gib)
    trials = []
    for size in sizes:
        trials.append(try_size(engine, towers, recipe, size, text_tokens, world_size))
        if trials[-1].step_s is None:
            break
    return trials


def imagine_ranks(recipe: Recipe, world_size: int) -> Ranks:
    """Be rank 0 of `world_size`; the others are imagined."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ranks = find_ranks(recipe.engine.device)
    init_distributed(ranks, fake=True)
    return ranks


def limit_memory(device: torch.device, gib: float) -> None:
    """Let the allocator refuse what a smaller card would not have."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        share = gib * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def try_size(engine: Engine, towers: Towers, recipe: Recipe, size: int, text_tokens: int, world_size: int) -> Trial:
    """Steps of one micro-batch each: the median of the timed ones, and the peaks of the phases."""
    batch = imagined_batch(recipe, size, text_tokens, world_size)
    peaks = {"forward": 0.0, "backward": 0.0, "update": 0.0}
    times = []
    try:
        if recipe.engine.memory_gib:
            print(fit_kept_layers(engine, towers, recipe, batch.micro_batches[0], recipe.engine.memory_gib), flush=True)
        for _ in range(WARM_UP + TIMED):
            begun = time.perf_counter()
            with measured_phases(engine, peaks):
                optimizer_step(engine, towers, recipe, batch, lr=0.0)
            synchronize(engine.device)
            times.append(time.perf_counter() - begun)
    except torch.OutOfMemoryError:
        return Trial(size, None)
    step_s = sorted(times[WARM_UP:])[TIMED // 2]
    supervised, kept = int(text_tokens * SUPERVISED_SHARE), engine.module.llm.keep_layers
    flops = flops_per_sample(recipe.config, text_tokens, supervised, recipe.engine.segment_layers, kept)
    gib = {f"{phase}_gib": value for phase, value in peaks.items()}
    return Trial(size, step_s, kept, **gib, useful_tflops=flops.useful * size / step_s / 1e12)


class measured_phases:  # noqa: N801 (reads as a verb in its with statement)
    """Notes the peak of allocated memory before the backward pass, up to the update, and in the update."""

    def __init__(self, engine: Engine, peaks: dict[str, float]):
        self.engine, self.peaks = engine, peaks

    def __enter__(self) -> None:
        self.originals = {name: getattr(self.engine, name) for name in ("backward", "step")}
        reset_peak()
        vars(self.engine)["backward"] = self._noting("forward", self.originals["backward"])
        vars(self.engine)["step"] = self._noting("backward", self.originals["step"])

    def __exit__(self, *_: object) -> None:
        self._note("update")
        vars(self.engine).update(self.originals)

    def _noting(self, phase: str, then: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            self._note(phase)
            return then(*arguments)

        return noted

    def _note(self, phase: str) -> None:
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


def imagined_batch(recipe: Recipe, size: int, text_tokens: int, world_size: int) -> GlobalBatch:
    """Noise of the right shapes; the second half of the text is supervised."""
    config = recipe.config
    tokens = torch.randint(2, config.llm.vocab_size, (size, text_tokens))
    targets = tokens.clone()
    targets[:, : text_tokens - int(text_tokens * SUPERVISED_SHARE)] = IGNORE_INDEX
    pixels = torch.randint(0, 256, (size, 3, config.vision.image_px, config.vision.image_px), dtype=torch.uint8)
    micro_batch = MicroBatch(tokens, targets, pixels, torch.ones(size, dtype=torch.bool))
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
        sources=BySource(torch.zeros(1, size, dtype=torch.int64), np.array([samples]), np.array([samples])),
    )


def longest_text(recipe: Recipe, otherwise: int) -> int:
    """In tokens, of the recipe's shards if they are there."""
    if recipe.data.shards is UNSET or not ShardFolder(Path(recipe.data.shards)).manifest.exists():
        return otherwise
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
    lines.append(f"largest that fits: {max(fitting)}" if fitting else "none fits: recompute more, or use more ranks")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--memory-gib", type=float, default=39.0)
    parser.add_argument("--text-tokens", type=int, default=295)
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", help="default: doubling up to the recipe's share of a rank"
    )
    parser.add_argument("--json", type=Path, help="write the trials there too")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    share = max(1, recipe.optim.global_batch // args.ranks)
    sizes = args.micro_batches or [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= share]
    text_tokens = longest_text(recipe, args.text_tokens)
    trials = rehearse(recipe, args.ranks, args.memory_gib, text_tokens, sizes)
    device = "cuda" if torch.cuda.is_available() and recipe.engine.device != "cpu" else "cpu"
    print(
        f"{recipe.model}, rank 0 of {args.ranks}, {recipe.config.vision.num_patches} + {text_tokens} tokens; ", end=""
    )
    print(f"{kernel_report(torch.device(device))}; {recipe.engine.ds_config}, {recipe.engine.precision}, ", end="")
    print(f"segments of {recipe.engine.segment_layers}")
    print(table(trials, args.memory_gib))
    if args.json:
        args.json.write_text(json.dumps([vars(trial) for trial in trials], indent=2))


if __name__ == "__main__":
    run_cli(main)
