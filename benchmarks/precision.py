"""Precision benchmark: loss curves of bf16 and autocast compared with fp32, on the demo's data.

    python -m benchmarks.precision runs/demo/shards OUT                  # needs a GPU; takes minutes
    python -m benchmarks.precision runs/demo/shards OUT --kind v1 --steps 50

A reduced model (8 layers of width 512, with the tiny preset's towers) trains on the same batches in each precision. A
second fp32 run with another micro-batch size shows the effect of rounding alone. The run folders, a figure and a table
are written to OUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from model.config import PUBLISHED_D_STATE, EmmaConfig
from model.errors import run_cli
from model.presets import PRESETS, paper_taps

RECIPE = "pipeline/recipes/demo.toml"
NUM_LAYERS, WIDTH = 8, 512
RUNS = {
    "fp32": ["engine.precision=fp32", "optim.micro_batch=32"],
    "fp32, other micro-batches": ["engine.precision=fp32", "optim.micro_batch=16"],
    "bf16": ["engine.precision=bf16", "optim.micro_batch=32"],
    "autocast": ["engine.precision=autocast", "optim.micro_batch=32"],
}
Line = dict[str, float]


def reduced(kind: str) -> EmmaConfig:
    """Return a tiny preset whose language model is wide and deep enough for precision to matter."""
    full = PRESETS[f"tiny_{kind}"]
    assert full.alignment is not None
    llm = replace(full.llm, d_model=WIDTH, num_layers=NUM_LAYERS, d_state=PUBLISHED_D_STATE[full.llm.kind])
    alignment = replace(full.alignment, taps=paper_taps(NUM_LAYERS), head_dim=64)
    return replace(full, name=f"reduced_{kind}", llm=llm, alignment=alignment)


def train_reduced(words: list[str]) -> None:
    """Run `pipeline.train` with the reduced presets registered."""
    from pipeline import train

    PRESETS.update({config.name: config for config in map(reduced, ("v1", "v2"))})
    sys.argv = ["pipeline.train", *words]
    train.main()


def run(kind: str, overrides: list[str], shards: Path, folder: Path, options: list[str]) -> list[Line]:
    """Train, and return the metrics of every step. Raises: RuntimeError with the last output if training fails."""
    common = [f"model=reduced_{kind}", f"data.shards={shards}", f"run.dir={folder}", "log.every_steps=1"]
    common += ["engine.ds_config=ds_configs/zero3.json", "engine.segment_layers=0", "optim.lr=1e-3", *options]
    command = [sys.executable, "-m", "benchmarks.precision", "--train", RECIPE, *common, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line and "loss/text" in line]


def table(curves: dict[str, list[Line]]) -> str:
    """Format a table of mean losses over the last quarter of the steps, and distances from fp32 over the last half."""
    rows = [
        "| precision | text loss | alignment | distance from fp32 | ms/step | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, lines in curves.items():
        last = lines[-len(lines) // 4 :]
        align = statistics.mean(line["loss/align"] for line in last if line["loss/align"] is not None)
        rows.append(
            f"| {name} | {_mean(last, 'loss/text'):.4f} | {align:.4f} | {distance(lines, curves['fp32']):.4f} | "
            f"{1000 * statistics.median(line['time/step_s'] for line in last):.0f} | "
            f"{last[-1]['memory/peak_gib'] or 0:.1f} |"
        )
    return "\n".join(rows)


def _mean(lines: list[Line], key: str) -> float:
    return statistics.mean(line[key] for line in lines)


def distance(lines: list[Line], reference: list[Line]) -> float:
    """Return the mean absolute difference of two smoothed loss curves over the second half of the steps."""
    ours, theirs = (smoothed([line["loss/text"] for line in part]) for part in (lines, reference))
    half = len(ours) // 2
    return statistics.mean(abs(a - b) for a, b in zip(ours[half:], theirs[half:], strict=True))


def smoothed(values: list[float], width: int = 20) -> list[float]:
    """Return the running mean of the last `width` values."""
    return [statistics.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def draw(curves: dict[str, list[Line]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, lines in curves.items():
        axes.plot(smoothed([line["loss/text"] for line in lines]), label=name, linewidth=1.2)
    axes.set(title=title, xlabel="step", ylabel="text loss, mean of 20 steps", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="shard set of the demo")
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--kind", choices=["v1", "v2"], default="v2", help="Mamba-1 or Mamba-2 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps per run (default %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    args = parser.parse_args()
    options = [f"steps={args.steps}", f"engine.device={args.device}", f"checkpoint.every_steps={args.steps}"]
    curves = {}
    for name, overrides in RUNS.items():
        curves[name] = run(args.kind, overrides, args.shards, args.out / name.replace(", ", "-"), options)
        print(f"{name}: {_mean(curves[name][-10:], 'loss/text'):.4f}", flush=True)
    draw(curves, f"reduced_{args.kind}, {args.steps} steps", args.out / "curves.png")
    (args.out / "table.md").write_text(table(curves) + "\n")
    print(table(curves))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_reduced(sys.argv[2:])
    else:
        run_cli(main)
