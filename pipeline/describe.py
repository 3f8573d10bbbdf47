"""Describe a recipe: parameters, FLOPs, memory and hours. Takes seconds, without weights, data or a GPU.

    python -m pipeline.describe pipeline/recipes/emma_v2.toml
    python -m pipeline.describe pipeline/recipes/emma_v1.toml --ranks 16 --mfu 0.45 --json
    python -m pipeline.describe pipeline/recipes/emma_v2.toml data.shards=/data/shards    # use their lengths

Hours are for A100s at the given model FLOPs utilisation (MFU). Steps and text lengths come from the recipe's shards if
they exist, otherwise from the paper's mix.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import UserError, run_cli
from pipeline.data.plan import count_steps
from pipeline.flops import CHECKPOINT_BYTES, GIB, STATE_BYTES, count_parameters, flops_per_sample
from pipeline.metrics.throughput import PEAK_FLOPS
from pipeline.recipe import Recipe, load_recipe
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest
from preprocess.strict_toml import UNSET

PAPER_ROWS, PAPER_TEXT_ONLY = 1_230_800, 40_688
TYPICAL_TEXT, TYPICAL_SUPERVISED = 295, 150  # tokens per sample, assumed when there are no shards


def describe(recipe: Recipe, ranks: int, mfu: float) -> dict[str, Any]:
    """Return every figure that the table shows, as `--json` prints them. `mfu` is a share between 0 and 1."""
    data = _data_facts(recipe)
    parameters = count_parameters(recipe.config)
    flops = flops_per_sample(
        recipe.config,
        data["text_tokens_per_sample"],
        data["supervised_per_sample"],
        recipe.engine.segment_layers,
        recipe.engine.keep_layers,
    )
    state = STATE_BYTES[recipe.engine.precision] * parameters.trainable
    step_flops = flops.useful * recipe.optim.global_batch
    return {
        "model": recipe.model,
        "parameters": {**asdict(parameters), "trainable": parameters.trainable},
        "data": data,
        "flops": {**asdict(flops), "useful": flops.useful, "total": flops.total, "useful_per_step": step_flops},
        "zero3_states_gib_per_rank": state / ranks / GIB,
        "towers_gib_per_rank": 2 * parameters.vision / GIB,
        "checkpoint_gib": CHECKPOINT_BYTES * parameters.trainable / GIB,
        "hours": data["steps"] * step_flops / (ranks * PEAK_FLOPS["A100"] * mfu) / 3600,
        "ranks": ranks,
        "mfu": mfu,
    }


def _data_facts(recipe: Recipe) -> dict[str, Any]:
    """Return sample counts and lengths of the recipe's shards if they exist, otherwise of the paper's mix."""
    batch, epochs = recipe.optim.global_batch, recipe.data.epochs
    if recipe.data.shards is not UNSET and ShardFolder(Path(recipe.data.shards)).manifest.exists():
        counts = Manifest.load(recipe.data.shards).counts
        with_image, text_only, samples = counts["with_image"], counts["text_only"], counts["samples"]
        text, supervised = counts["text_tokens"] // samples, counts["supervised_tokens"] // samples
        source = recipe.data.shards
    else:
        with_image, text_only = PAPER_ROWS - PAPER_TEXT_ONLY, PAPER_TEXT_ONLY
        text, supervised, source = TYPICAL_TEXT, TYPICAL_SUPERVISED, "the paper's mix, typical lengths"
    return {
        "source": source,
        "samples": with_image + text_only,
        "text_tokens_per_sample": text,
        "supervised_per_sample": supervised,
        "tokens_per_sample": text + recipe.config.vision.num_patches,
        "steps": recipe.steps or epochs * count_steps(with_image=with_image, text_only=text_only, global_batch=batch),
    }


def table(facts: dict[str, Any]) -> str:
    parameters, flops, data = facts["parameters"], facts["flops"], facts["data"]
    rows = [(f"parameters: {part}", f"{count:,}") for part, count in parameters.items() if part != "trainable"]
    rows += [
        ("  trainable", f"{parameters['trainable']:,}"),
        ("  frozen", f"{parameters['vision']:,}"),
        ("samples", f"{data['samples']:,} ({data['source']})"),
        ("tokens per sample", f"{data['tokens_per_sample']} ({data['text_tokens_per_sample']} of them text)"),
        ("optimizer steps", f"{data['steps']:,}"),
        ("useful TFLOP per sample", f"{flops['useful'] / 1e12:.2f}"),
        ("  with recomputation", f"{flops['total'] / 1e12:.2f}"),
        ("useful PFLOP per step", f"{flops['useful_per_step'] / 1e15:.3f}"),
        (
            "training states per rank",
            f"{facts['zero3_states_gib_per_rank']:.1f} GiB over {facts['ranks']} ranks (ZeRO-3)",
        ),
        ("towers per rank", f"{facts['towers_gib_per_rank']:.1f} GiB"),
        ("checkpoint on disk", f"{facts['checkpoint_gib']:.1f} GiB"),
        ("hours", f"{facts['hours']:.1f} on {facts['ranks']} × A100 at {facts['mfu']:.0%} MFU"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([facts["model"], *(f"  {name:<{width}}  {value}" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="TOML file, such as pipeline/recipes/emma_v2.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as optim.lr=1e-5")
    parser.add_argument("--ranks", type=int, default=8, help="number of GPUs (default %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak FLOP/s (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    args = parser.parse_args()
    if args.ranks < 1 or not 0 < args.mfu <= 1:
        raise UserError(
            f"--ranks {args.ranks} --mfu {args.mfu}: expected at least 1 rank, and an MFU above 0 and at most 1"
        )
    recipe = load_recipe(args.recipe, args.overrides, planning=True)
    facts = describe(recipe, args.ranks, args.mfu)
    print(json.dumps(facts, indent=2) if args.json else table(facts))


if __name__ == "__main__":
    run_cli(main)
