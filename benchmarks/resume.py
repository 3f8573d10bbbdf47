"""Resume benchmark at full size: seconds of the first launch, of resuming, and of the shutdown after a lost rank.

    python -m benchmarks.resume /scratch pipeline/recipes/emma_v2.toml --ranks 2 --json resume.json
    python -m benchmarks.resume /tmp/scratch pipeline/recipes/demo.toml --ranks 2          # on a CPU

All weights are random; those of the towers are loaded from files in the published format. The data is a few repeated
photographs. The first launch saves a checkpoint and is killed with SIGKILL a few steps later. Then the page cache is
dropped, if the system permits it. The second launch resumes from the checkpoint, and one of its ranks is killed.
docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import save_file

from benchmarks.photographs import dialogue, write_rows
from model.errors import run_cli
from model.presets import preset
from model.vision import Towers
from pipeline.recipe import load_recipe
from preprocess import build_shards
from preprocess.demo.mix import train_tokenizer

NUM_IMAGES = 32
STEPS_AFTER_RESUME = 3
TIMEOUT_S = 600.0

Line = dict[str, Any]


def build_set(folder: Path, model: str, *, images: int = NUM_IMAGES, rows_per_image: int = 1, words: int = 40) -> Path:
    """Build shards about photographs. Each of the three answers of a row has this number of words."""
    root = folder / "root"
    write_rows(root, images, rows_per_image, words)
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokenizer((turn["value"] for i in range(200) for turn in dialogue(i)), root / "tokenizer")
    command = [root / "mix.toml", "--model", model, "--root", root, "--out", folder / "shards", "--workers", 0]
    code = build_shards.main([str(word) for word in [*command, "--tokenizer", root / "tokenizer"]])
    assert code == 0, f"the shards were not built: exit code {code}"
    return folder / "shards"


def write_towers(folder: Path, model: str) -> Path:
    """Write random towers in files of the published format."""
    folder.mkdir()
    for name, tower in Towers(preset(model).vision).towers.items():
        save_file(tower.vit.state_dict(), folder / f"{name}.safetensors")
    return folder


class TrainingProcess:
    """One launch of the training command. As a context manager, it kills the training at the end of the block.

    Args:
        command: Recipe and overrides.
        run: Run folder.
        ranks: Number of ranks on this machine.
        program: Module to launch, and its arguments before the recipe.
    """

    def __init__(self, command: list[str], run: Path, ranks: int, program: Sequence[str] = ("pipeline.train",)):
        self.run, self.seen = run, len(lines(run))
        self.launched, self.log = time.time(), (run.parent / "log.txt").open("a")
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
        words = [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", "-m", *program, *command]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.log.close()

    @property
    def ranks(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def kill(self) -> None:
        """SIGKILL the launcher and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for member in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self.process.wait()

    def until(self, condition: Callable[[Line], bool]) -> Line:
        """Wait for the first line of this launch in metrics.jsonl that meets the condition, and return it."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if found := next(filter(condition, lines(self.run)[self.seen :]), None):
                return found
            assert not ended, f"the training ended early: see {self.log.name}"
            time.sleep(0.02)
        raise AssertionError(f"no such line within {TIMEOUT_S:g} s: see {self.log.name}")

    def until_step(self, step: int) -> Line:
        return self.until(lambda line: "event" not in line and line["step"] == step)

    def start_up(self) -> dict[str, Any]:
        """Return the seconds from the launch to the loop and to the end of the first step, in total and by phase."""
        begun = self.until(lambda line: line.get("event") in ("start", "resume"))
        first = self.until_step(begun["step"] + 1)
        launch, loop = begun["began"] - self.launched, begun["time"] - self.launched
        parts = {"launch": launch, **begun["start_s"], "first step": first["time"] - begun["time"]}
        return {"step": begun["step"], "loop_s": loop, "first_step_s": first["time"] - self.launched, "parts": parts}


def lines(run: Path) -> list[Line]:
    """Return the complete lines of metrics.jsonl; the last one may still be written."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    return []


def drop_page_cache() -> bool:
    """Drop the system's page cache. Return whether that was permitted."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return True
    return False


def losses(run: Path, steps: range) -> list[dict[int, float]]:
    """Return the text losses of these steps, as one dictionary per launch."""
    by_start: list[dict[int, float]] = [{}]
    for line in lines(run):
        if line.get("event") == "resume":
            by_start.append({})
        elif "event" not in line and line["step"] in steps:
            by_start[-1][line["step"]] = line["loss/text"]
    return by_start


def checkpoint_gb(run: Path) -> float:
    return sum(file.stat().st_size for file in (run / "checkpoints").glob("step-*/*")) / 1e9


def measure(
    folder: Path, recipe: str, ranks: int, overrides: list[str], save_at: int, shards: Path | None
) -> dict[str, Any]:
    run = folder / "run"
    plan = load_recipe(recipe, overrides, planning=True)
    shards = shards or build_set(folder, plan.model)
    towers = write_towers(folder / "towers", plan.model)
    words = [recipe, f"data.shards={shards}", f"data.tokenizer={shards}", f"run.dir={run}", f"weights.towers={towers}"]
    words += ["weights.llm=random", "log.every_steps=1", "log.wandb=off", "steps=1000"]
    command = [*words, f"checkpoint.every_steps={save_at}", "checkpoint.keep_last=1", *overrides]
    results: dict[str, Any] = {"model": plan.model, "ranks": ranks}
    with TrainingProcess(command, run, ranks) as training:
        results["start"] = training.start_up()
        saved = training.until(lambda line: line.get("event") == "save")
        training.until_step(saved["step"] + 1)
        results["save"] = {"gb": checkpoint_gb(run), "stall_s": saved["seconds"], "whole_s": saved["whole_s"]}
    command.append("checkpoint.every_steps=1000")
    results["cold"] = drop_page_cache()
    with TrainingProcess(command, run, ranks) as training:
        results["resume"] = training.start_up()
        last = training.until_step(results["resume"]["step"] + STEPS_AFTER_RESUME)
        results["losses"] = losses(run, range(results["resume"]["step"] + 1, last["step"] + 1))
        results["lost_rank"] = lose_a_rank(training) if ranks > 1 else None
    return results


def lose_a_rank(training: TrainingProcess) -> dict[str, Any]:
    """Kill the last rank. Return the seconds until the other ranks have ended, and the outcome of the run."""
    ranks = training.ranks
    begun = time.monotonic()
    max(ranks, key=lambda process: process.pid).kill()  # the launcher starts the ranks in order
    psutil.wait_procs(ranks, timeout=TIMEOUT_S)
    took = time.monotonic() - begun
    training.process.wait(timeout=TIMEOUT_S)
    return {"others_ended_s": took, "outcome": json.loads((training.run / "outcome.json").read_text())}


def table(results: dict[str, Any]) -> str:
    """Format the results as a Markdown table of the seconds of each phase, and lines about the save and the losses."""
    starts = [("first launch", results["start"]), ("resume", results["resume"])]
    phases = list(results["start"]["parts"])
    lines = [f"{results['model']}, {results['ranks']} ranks; page cache {'dropped' if results['cold'] else 'kept'}"]
    lines += [f"| s | {' | '.join(phases)} | until the first step is done |", "|---" * (len(phases) + 2) + "|"]
    for name, start in starts:
        parts = " | ".join(f"{start['parts'][phase]:.1f}" for phase in phases)
        lines.append(f"| {name} | {parts} | **{start['first_step_s']:.1f}** |")
    save = results["save"]
    lines.append(f"save: {save['gb']:.1f} GB in {save['whole_s']:.1f} s, training stalled for {save['stall_s']:.1f} s")
    for losses_of_start in results["losses"]:
        lines.append("text loss: " + ", ".join(f"step {step} {loss:.4f}" for step, loss in losses_of_start.items()))
    if lost := results["lost_rank"]:
        outcome = lost["outcome"]
        ending = f"{outcome['outcome']} ({outcome['reason']})"
        lines.append(f"one rank killed: the other ranks ended after {lost['others_ended_s']:.1f} s, outcome {ending}")
    return "\n".join(lines)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="resume-benchmark-", dir=parent))
    yield folder
    shutil.rmtree(folder)  # kept after an error, because it holds the log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder on the disk to measure")
    parser.add_argument("recipe", nargs="?", default="pipeline/recipes/emma_v2.toml", help="default: emma_v2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default %(default)s)")
    parser.add_argument("--save-at", type=int, default=24, help="step of the save (default %(default)s)")
    parser.add_argument("--shards", type=Path, help="use this set instead of building one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_intermixed_args()
    with scratch(args.folder) as folder:
        results = measure(folder, args.recipe, args.ranks, args.overrides, args.save_at, args.shards)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
