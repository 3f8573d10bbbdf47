"""Benchmark of training on all GPUs of one host: speed, scaling, kills and resumes, in stages of a few minutes each.

    python -m benchmarks.multi_gpu --stage speed_v2 --folder /scratch --out results     # 100 steps of V2 under ZeRO-3
    python -m benchmarks.multi_gpu --stage resume --folder /scratch --out results       # kills, resumes, half the ranks
    python -m benchmarks.multi_gpu --stage table --out results                          # all results as Markdown

Every stage trains through `pipeline.train` on shards that our own preprocessing builds from generated data. All weights
are random. torch may allocate --memory-gib of each GPU. A stage writes OUT/STAGE.json after each measurement, so a
stage that is cut off keeps what it has measured. The stages, the most valuable first, are: {stages}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.multi_gpu_table import table
from benchmarks.resume import TrainingProcess, build_set, lines, lose_a_rank, write_towers
from model.errors import UserError, run_cli
from pipeline.recipe import load_recipe

ZERO2, ZERO3 = "ds_configs/zero2.json", "ds_configs/zero3.json"
ROWS_PER_IMAGE, WORDS = 8, 85
WARM_UP = 5  # one in this many steps, at the beginning, is not timed
SAVE_AT, STEPS_AFTER = 6, 3
TESTS = "tests/test_pipeline_gpu.py"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine and the files of a stage.

    recipes      recipe of each model, by "v1" and "v2"
    overrides    recipe overrides of every training
    images       different images in the shards; each occurs in ROWS_PER_IMAGE rows
    steps        steps of a speed measurement under ZeRO-3; the other measurements take a fifth of them
    """

    ranks: int
    memory_gib: float
    folder: Path
    out: Path
    recipes: dict[str, str]
    overrides: list[str]
    micro_batch: int
    steps: int
    images: int

    def command(self, kind: str, run: Path, *settings: str) -> list[str]:
        """Return recipe and overrides of a new run. Build shards and towers if they do not exist yet."""
        shutil.rmtree(run, ignore_errors=True)  # of an earlier call of the same stage
        recipe, data, towers = self.recipes[kind], self.folder / f"data-{kind}", self.folder / "towers"
        model = load_recipe(recipe, self.overrides, planning=True).model
        if not (data / "shards/manifest.json").exists():
            data.mkdir(parents=True, exist_ok=True)
            build_set(data, model, images=self.images, rows_per_image=ROWS_PER_IMAGE, words=WORDS)
        if not towers.exists():
            write_towers(towers, model)
        files = [f"data.shards={data}/shards", f"data.tokenizer={data}/shards", f"weights.towers={towers}"]
        rest = ["weights.llm=random", "steps=1000", "log.every_steps=1", "log.wandb=off", "checkpoint.keep_last=1"]
        return [recipe, *files, f"run.dir={run}", *rest, *self.overrides, *settings]

    def launch(self, command: list[str], run: Path, ranks: int) -> TrainingProcess:
        limit = 0.0 if ranks == 1 else self.memory_gib  # the states of one rank alone need more than the limit
        return TrainingProcess(command, run, ranks, ["benchmarks.limited_training", str(limit)])


def speed(host: Host, kind: str, zero: str, *, ranks: int, micro_batch: int, steps: int) -> Row:
    """Train for some steps. Return speed and memory, and what a dry run on one GPU predicts for them."""
    name = f"{kind}-{Path(zero).stem}-{ranks}-{micro_batch}"
    run = host.folder / f"run-{name}"
    settings = [f"engine.ds_config={zero}", f"optim.micro_batch={micro_batch}", "checkpoint.every_steps=1000"]
    command = host.command(kind, run, *settings)
    row: Row = {"model": kind, "engine": Path(zero).stem, "ranks": ranks, "micro_batch": micro_batch}
    row["global_batch"] = load_recipe(command[0], command[1:], planning=True).optim.global_batch
    row["memory_gib"] = host.memory_gib if ranks > 1 else None
    try:
        with host.launch(command, run, ranks) as training:
            row["start_up"] = training.start_up()
            training.until_step(steps)
            done = lines(run)[training.seen :]
    except AssertionError as error:
        return row | {"failed": f"{error}: {last_error(run)}"}
    timed = [line for line in done if "event" not in line and steps // WARM_UP < line["step"] <= steps]
    columns = ["time/step_s", "speed/samples_per_s", "speed/mfu", "time/data_wait_s", "data/padding_ratio"]
    medians = {key.partition("/")[2]: _median([line[key] for line in timed]) for key in columns}
    row |= {"steps": len(timed), **medians, "peak_gib": timed[-1]["memory/peak_gib"]}
    row["loss"] = [timed[0]["loss/text"], timed[-1]["loss/text"]]
    return row | {"predicted": dry_run(host, command, ranks, micro_batch)}


def _median(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def last_error(run: Path) -> str:
    """Return the last line of the log that looks like an error."""
    log = (run.parent / "log.txt").read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(log) if "error" in line.lower()), "no error in the log")


def dry_run(host: Host, command: list[str], ranks: int, micro_batch: int) -> Row | None:
    """Return the dry run's step time and memory of one micro-batch without communication. None if the run failed."""
    out = host.folder / "dry_run.json"
    words = [sys.executable, "-m", "pipeline.dry_run", *command, "--ranks", str(ranks), "--json", str(out)]
    limit = host.memory_gib if ranks > 1 else 1000.0
    words += ["--micro-batches", str(micro_batch), "--memory-gib", str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    [trial] = json.loads(out.read_text())
    return {"step_s": trial["step_s"], "peak_gib": max(trial[f"{p}_gib"] for p in ("forward", "backward", "update"))}


# -- Stages ------------------------------------------------------------------------------------------------------------


def speed_stage(host: Host, save: Callable[[Any], None], *, kind: str) -> None:
    save([speed(host, kind, ZERO3, ranks=host.ranks, micro_batch=host.micro_batch, steps=host.steps)])


def zero2_stage(host: Host, save: Callable[[Any], None]) -> None:
    rows = []
    for kind in host.recipes:
        rows.append(
            speed(host, kind, ZERO2, ranks=host.ranks, micro_batch=host.micro_batch, steps=host.steps // WARM_UP)
        )
        save(rows)


def scaling_stage(host: Host, save: Callable[[Any], None]) -> None:
    """Train V2 on all ranks, a half and a quarter of them, with the same small micro-batch."""
    rows = []
    for ranks in sorted({host.ranks, host.ranks // 2, host.ranks // 4} - {0}, reverse=True):
        micro_batch = max(host.micro_batch // 2, 1)
        rows.append(speed(host, "v2", ZERO3, ranks=ranks, micro_batch=micro_batch, steps=host.steps // WARM_UP))
        save(rows)


def resume_stage(host: Host, save: Callable[[Any], None]) -> None:
    """Kill all ranks after a save, then resume on all ranks, on half of them, and on all again, from the same save.

    After the first resume, one rank is killed alone. The last launch is stopped by a file.
    """
    run = host.folder / "run-resume"
    command = host.command("v2", run, f"optim.micro_batch={host.micro_batch}")
    found: Row = {"ranks": host.ranks}
    with host.launch([*command, f"checkpoint.every_steps={SAVE_AT}"], run, host.ranks) as training:
        found["start"] = training.start_up()
        saved = training.until(lambda line: line.get("event") == "save")
        found["save"] = {"stall_s": saved["seconds"], "whole_s": saved["whole_s"]}
    save(found)
    command.append("checkpoint.every_steps=1000")
    with host.launch(command, run, host.ranks) as training:
        found["resume"] = resumed(training)
        found["lost_rank"] = lose_a_rank(training)
    save(found)
    half = max(host.ranks // 2, 1)
    with host.launch(command, run, half) as training:
        found["resume_on_half"] = {"ranks": half, **resumed(training)}
    save(found)
    with host.launch(command, run, host.ranks) as training:
        found["resume_after_lost_rank"] = resumed(training)
        found["stop"] = stop_by_file(training)
    save(found)


def resumed(training: TrainingProcess) -> Row:
    """Wait for the first steps after a resume. Return the seconds of the start-up, and the losses of these steps."""
    start = training.start_up()
    last = training.until_step(start["step"] + STEPS_AFTER)["step"]
    of_launch = [line for line in lines(training.run)[training.seen :] if "event" not in line]
    return start | {"losses": {line["step"]: line["loss/text"] for line in of_launch if line["step"] <= last}}


def stop_by_file(training: TrainingProcess) -> Row:
    """Request a stop. Return the seconds until all ranks have saved and ended, the exit code and the outcome."""
    begun = time.monotonic()
    (training.run / "control/stop").touch()
    code = training.process.wait(timeout=600)
    outcome = json.loads((training.run / "outcome.json").read_text())
    return {"seconds": time.monotonic() - begun, "exit_code": code, "outcome": outcome["outcome"]}


def tests_stage(host: Host, save: Callable[[Any], None]) -> None:
    begun = time.monotonic()
    words = [sys.executable, "-m", "pytest", "-q", TESTS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    save({"exit_code": done.returncode, "summary": done.stdout.splitlines()[-1:], "seconds": time.monotonic() - begun})


STAGES: dict[str, Callable[[Host, Callable[[Any], None]], None]] = {
    "speed_v2": partial(speed_stage, kind="v2"),
    "resume": resume_stage,
    "speed_v1": partial(speed_stage, kind="v1"),
    "scaling": scaling_stage,
    "zero2": zero2_stage,
    "tests": tests_stage,
}


def main() -> None:
    description = (__doc__ or "").format(stages=", ".join(STAGES))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides of every training")
    parser.add_argument("--stage", required=True, choices=[*STAGES, "table"], help="what to measure, or the table")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--folder", type=Path, help="folder for data and runs; V2's checkpoints need 80 GB")
    parser.add_argument("--ranks", type=int, default=8, help="number of GPUs (default %(default)s)")
    parser.add_argument("--memory-gib", type=float, default=39.0, help="memory of each GPU (default %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples per forward pass (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a speed measurement (default %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images in the shards (default %(default)s)")
    recipes = ["pipeline/recipes/emma_v2.toml", "pipeline/recipes/emma_v1.toml"]
    parser.add_argument(
        "--recipes", nargs=2, default=recipes, metavar=("V2", "V1"), help="default: emma_v2 and emma_v1"
    )
    args = parser.parse_intermixed_args()
    if args.stage == "table":
        print(table({name: _read(args.out / f"{name}.json") for name in STAGES}))
        return
    if args.folder is None:
        raise UserError(f"--stage {args.stage}: needs --folder, a folder for data and runs")
    host = Host(
        ranks=args.ranks,
        memory_gib=args.memory_gib,
        folder=args.folder,
        out=args.out,
        recipes=dict(zip(("v2", "v1"), args.recipes, strict=True)),
        overrides=args.overrides,
        micro_batch=args.micro_batch,
        steps=args.steps,
        images=args.images,
    )
    for folder in (args.folder, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    def save(results: Any) -> None:
        facts = {"gpu": device, "ranks": host.ranks, "results": results}
        (host.out / f"{args.stage}.json").write_text(json.dumps(facts, indent=2))

    STAGES[args.stage](host, save)


def _read(path: Path) -> Row | None:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    run_cli(main)
