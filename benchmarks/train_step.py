"""Training step benchmark: milliseconds, TFLOP/s and memory of one rank of eight, at full size, with several settings.

    python -m benchmarks.train_step --json train_step.json            # needs one GPU; takes minutes
    python -m benchmarks.train_step --only zero2 --micro-batches 16
    python -m benchmarks.train_step --only "V1 zero3" --micro-batches 1 16

Each variant runs `pipeline.dry_run --profile` in its own process. "busy" is the time in which any kernel runs. A step
of micro-batch 1 launches the same kernels, so its time is about the host's time for launching them. docs/performance.md
has the table and names the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError, run_cli

ZERO2 = "engine.ds_config=ds_configs/zero2.json"
VARIANTS: dict[str, tuple[str, list[str]]] = {  # recipe and overrides
    "V2 zero3, segments of 4": ("emma_v2", []),
    "V2 zero2, segments of 4": ("emma_v2", [ZERO2]),
    "V2 zero3, autocast": ("emma_v2", ["engine.precision=autocast"]),
    "V2 zero3, segments of 4, 24 layers kept": ("emma_v2", ["engine.keep_layers=24"]),
    "V2 zero2, segments of 4, 16 layers kept": ("emma_v2", [ZERO2, "engine.keep_layers=16"]),
    "V2 zero3, every layer": ("emma_v2", ["engine.segment_layers=1"]),
    "V2 zero3, nothing recomputed": ("emma_v2", ["engine.segment_layers=0"]),
    "V1 zero3, segments of 4": ("emma_v1", []),
    "V1 zero3, segments of 4, mamba_ssm's scan": ("emma_v1", []),
    "V1 zero2, segments of 4": ("emma_v1", [ZERO2]),
    "V1 zero3, segments of 4, 12 layers kept": ("emma_v1", ["engine.keep_layers=12"]),
    "V1 zero3, segments of 4, 12 layers kept, mamba_ssm's scan": ("emma_v1", ["engine.keep_layers=12"]),
}


def run_variant(name: str, sizes: list[int], memory_gib: float) -> list[dict[str, Any]]:
    """Run one variant and return its trials. Raises: RuntimeError with the end of the output if the dry run fails."""
    recipe, overrides = VARIANTS[name]
    environment = {**os.environ, "EMMA_MAMBA1_SCAN": "mamba_ssm" if "mamba_ssm" in name else "own"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trials.json"
        command = [sys.executable, "-m", "pipeline.dry_run", f"pipeline/recipes/{recipe}.toml", *overrides]
        command += ["--profile", "--memory-gib", str(memory_gib), "--json", str(out)]
        command += ["--micro-batches", *map(str, sizes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
        trials: list[dict[str, Any]] = json.loads(out.read_text())
        return trials


def line(name: str, trial: dict[str, Any]) -> str:
    """Format one row of the Markdown table."""
    if trial["step_s"] is None:
        return f"| {name} | {trial['micro_batch']} | does not fit | | | | |"
    peak = max(trial[f"{phase}_gib"] for phase in ("forward", "backward", "update"))
    kinds = ", ".join(f"{kind} {1000 * seconds:.0f}" for kind, seconds in trial["profile"]["seconds_by_kind"].items())
    return (
        f"| {name} | {trial['micro_batch']} | {1000 * trial['step_s']:.0f} | {1000 * trial['profile']['busy_s']:.0f} | "
        f"{trial['useful_tflops']:.0f} | {peak:.1f} | {kinds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the variants whose name contains this text")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[16], help="sizes to try (default: 16)")
    parser.add_argument("--memory-gib", type=float, default=39.0, help="limit of GPU memory (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("torch finds no GPU on this machine; the benchmark needs one")
    results = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| variant | micro-batch | ms/step | busy ms | useful TFLOP/s | peak GiB | GPU time by kind, ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in (name for name in VARIANTS if args.only in name):
        try:
            results[name] = run_variant(name, args.micro_batches, args.memory_gib)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        for trial in results[name]:
            print(line(name, trial), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
