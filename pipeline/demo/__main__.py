"""Run the whole pipeline on the CPU: raw data, shards, training, a kill and a resume, export, answers.

    make demo                                # or, in an environment where the project is installed:
    python -m pipeline.demo --dir runs/demo

All output goes to the folder `--dir`, which is emptied first. Nothing is downloaded. The demo fails unless the trained
model answers far more held-out questions correctly than it would by guessing or without the right image.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from model.errors import UserError, run_cli
from pipeline.demo.processes import Commands, kill_process_tree
from pipeline.demo.ray_head import ray_head
from pipeline.demo.report import SHEET_COLUMNS, Results, sample_answers, summary, table
from pipeline.evaluation.exact_match import Question, ask, most_common_answers, read_questions, shuffle_images
from pipeline.figures.curves import draw_answers, draw_run
from pipeline.figures.maps import draw_models
from pipeline.inference.engine import InferenceEngine, load
from pipeline.metrics.history import read_history
from pipeline.recipe import load_recipe
from pipeline.visualization.states import default_layers, look_inside
from preprocess.atomic import write_json
from preprocess.demo.mix import HELD_OUT, MODEL, QUESTIONS, TOKENIZER, write_mix
from preprocess.images.codec import read_image_file
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest

RECIPE = "pipeline/recipes/demo.toml"
MIX = "preprocess/mixes/demo.toml"
RANKS = 2
SAMPLES_PER_SHARD = 512
MIN_MARGIN = 0.25  # by which exact match must exceed every control; with less, something is broken
MARKER = ".emma-demo"  # file in a folder that the demo has created, and may therefore empty
JOB = "emma-demo"
STEP_LINE = re.compile(r"step +(\d+)/")
THREADS = {"OMP_NUM_THREADS": "1"}  # per rank
SHOW_EVERY_STEPS = 50
RAY_NOISE = re.compile(r"^$|^-+$|\.py:\d+ -- |Next steps|Query the|Request the|Tailing|^ +ray job")


class DemoFolder:
    """Paths of the demo's output. They are absolute because a Ray job runs in a copy of the checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.raw, self.shards, self.run = self.root / "raw", self.root / "shards", self.root / "run"
        self.model, self.untrained, self.logs = self.root / "model", self.root / "untrained", self.root / "logs"

    @property
    def held_out(self) -> Path:
        return self.raw / HELD_OUT


class StageTimer:
    """Print the start of each stage and record how many seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    @contextmanager
    def stage(self, name: str, description: str) -> Iterator[None]:
        print(f"\n[{name}] {description}", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        print(f"[{name}] took {self.seconds[name]:.1f} s", flush=True)

    def with_total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.monotonic() - self.began}


def demo(folder: Path) -> Results:
    """Run every stage in `folder`, which is emptied first. Raises: UserError if a stage fails."""
    paths, timer = DemoFolder(folder), StageTimer()
    empty_folder(paths.root)
    commands = Commands(paths.logs)
    with timer.stage("data", "photographs, rendered scenes and text-only dialogues, in three source formats"):
        for source, rows in write_mix(paths.raw).items():
            print(f"  {source:<6} {rows:>5} rows")
    with timer.stage("shards", "a Ray job turns annotations and images into WebDataset tars"):
        job_s = build_shards(commands, paths)
        manifest = Manifest.load(paths.shards)
    with timer.stage("train", f"DeepSpeed ZeRO-3 on {RANKS} ranks, killed half-way and resumed by the same command"):
        killed_at = train_with_a_kill(commands, paths)
    with timer.stage("answers", "export, load, and answer questions about held-out images"):
        export(commands, paths)
        questions = read_questions(paths.held_out / QUESTIONS)
        answers = answer(paths, questions)
        draw_maps(paths, questions)
    return Results(
        seconds=timer.with_total(),
        samples=manifest.counts["samples"],
        shards_job_s=job_s,
        rejects=manifest.rejects_by_reason,
        global_batch=load_recipe(RECIPE, overrides(paths)).optim.global_batch,
        killed_at_step=killed_at,
        history=read_history(paths.run),
        questions=questions,
        answers=answers,
    )


def empty_folder(folder: Path) -> None:
    """Empty the folder of an earlier demo. Raises: UserError if the folder holds anything else."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise UserError(f"--dir {folder}: not empty, and not written by an earlier demo. Choose another folder.")
        print(f"removing the output of an earlier demo: {folder}", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


# -- Shards ------------------------------------------------------------------------------------------------------------


def build_shards(commands: Commands, paths: DemoFolder) -> float:
    """Build the shards in a Ray job and print the rejected rows. Return the seconds that the job took."""
    program: list[str | Path] = ["python", "preprocess/build_shards.py", MIX, "--model", MODEL]
    program += ["--root", paths.raw, "--out", paths.shards, "--tokenizer", paths.raw / TOKENIZER]
    program += ["--samples-per-shard", str(SAMPLES_PER_SHARD)]
    print("  $ ray start --head --block …", flush=True)
    with ray_head(paths.logs / "ray_head.log") as head:
        began = time.monotonic()
        submit = ["ray", "job", "submit", "--submission-id", JOB, "--working-dir", ".", "--", *program]
        commands.run("ray_job", submit, keep=lambda line: not RAY_NOISE.search(line), **head.environment)
        job_s = time.monotonic() - began
        # `submit` also exits with 0 if the job was stopped, so check the job's status.
        status = commands.run("ray_status", ["ray", "job", "status", JOB], keep=lambda _: False, **head.environment)
    if not any("succeeded" in line for line in status):
        raise UserError(f"the Ray job failed; see {paths.logs}")
    print("  the job succeeded; rejected rows:")
    for line in ShardFolder(paths.shards).rejects.read_text(encoding="utf-8").splitlines():
        reject = json.loads(line)
        print(f"    {reject['source']:<5} row {reject['row']:<5} {reject['reason']:<28} {reject['detail']}")
    return job_s


# -- Training ----------------------------------------------------------------------------------------------------------


def overrides(paths: DemoFolder) -> list[str]:
    return [f"data.shards={paths.shards}", f"run.dir={paths.run}"]


def train_with_a_kill(commands: Commands, paths: DemoFolder) -> int:
    """Train, kill every process half-way, and resume with the same command. Return the last step before the kill."""
    steps = load_recipe(RECIPE, overrides(paths)).steps
    assert steps is not None, f"{RECIPE} must set `steps`"
    command = ["torchrun", "--standalone", f"--nproc-per-node={RANKS}", "-m", "pipeline.train", RECIPE]
    command += overrides(paths)
    killed_at = train_until(commands, command, steps // 2)
    if not (paths.run / "checkpoints" / "latest").exists():
        raise UserError(f"no checkpoint was saved by step {killed_at}; see {paths.logs / 'train.log'}")
    commands.run("train", command, keep=_is_shown, **THREADS)
    outcome = json.loads((paths.run / "outcome.json").read_text(encoding="utf-8"))
    if outcome["outcome"] != "done":
        raise UserError(f"the resumed training ended as {outcome['outcome']!r}: {outcome['reason']}")
    return killed_at


def train_until(commands: Commands, command: Sequence[str], last_step: int) -> int:
    """Start the training and SIGKILL it when it logs `last_step`. Raises: UserError if it ends earlier."""
    with commands.running(command, **THREADS) as process:
        for line in commands.lines("train", process):
            if _is_shown(line):
                commands.show(line)
            step = _step_of(line)
            if step is not None and step >= last_step:
                num_killed = kill_process_tree(process.pid)
                print(f"  killed all {num_killed} processes of the training at step {step}", flush=True)
                return step
    raise UserError(f"the training ended before step {last_step}: {commands.log_tail('train')}")


def _step_of(line: str) -> int | None:
    match = STEP_LINE.match(line)
    return int(match[1]) if match else None


def _is_shown(line: str) -> bool:
    """Return whether to print a line of the training's output. Of the lines that report a step, only some are shown."""
    step = _step_of(line)
    return bool(line) if step is None else step == 1 or step % SHOW_EVERY_STEPS == 0


# -- Answers -----------------------------------------------------------------------------------------------------------


def export(commands: Commands, paths: DemoFolder) -> None:
    python = [sys.executable, "-m", "pipeline.export"]
    start: list[str | Path] = ["--untrained", RECIPE, paths.untrained, *overrides(paths)]
    commands.run("export", [*python, paths.run, paths.model, "--with-alignment"], _starts_with(paths.model))
    commands.run("export", [*python, *start], _starts_with(paths.untrained))


def _starts_with(path: Path) -> Callable[[str], bool]:
    return lambda line: line.startswith(str(path))


def answer(paths: DemoFolder, questions: Sequence[Question]) -> dict[str, Sequence[str]]:
    """Answer the questions with the trained model and with each control. Return the answers by name."""
    torch.set_num_threads(1)  # matrices this small run no faster on more threads
    trained, untrained = (InferenceEngine(*load(folder, "cpu")) for folder in (paths.model, paths.untrained))
    print(f"  {len(questions)} questions about {len({q.image for q in questions})} images, answered three times")
    return {
        "trained": ask(trained, questions, paths.held_out),
        "untrained": ask(untrained, questions, paths.held_out),
        "commonest": most_common_answers(questions),
        "shuffled": ask(trained, shuffle_images(questions, seed=0), paths.held_out),
    }


def draw_maps(paths: DemoFolder, questions: Sequence[Question]) -> None:
    """Draw the trained model's visual states for the first held-out image with five shapes."""
    image = next(question.image for question in questions if question.answer == "five")
    model, _ = load(paths.model, "cpu")
    pixels = read_image_file(paths.held_out / str(image), model.config.vision.image_px)
    maps = look_inside(model, pixels, default_layers(model.config), tap="mixer", title="The demo's trained model")
    draw_models([maps], paths.root / "maps.png")


def finish(results: Results, paths: DemoFolder) -> None:
    """Write the report and print its table. Raises: UserError if the model did not learn."""
    write_json(paths.root / "summary.json", summary(results))
    draw_run(results.history, paths.root / "loss.png")
    draw_answers(sample_answers(results, paths.held_out), paths.root / "answers.png", columns=SHEET_COLUMNS)
    print(f"\n{table(results)}\n\n{paths.root}: summary.json, loss.png, answers.png, maps.png, model/ (ask it:")
    print(f"  python -m pipeline.generate {paths.model} --image IMAGE --prompt QUESTION)", flush=True)
    if results.margin < MIN_MARGIN:
        raise UserError(
            f"the trained model beats the best control by {results.margin:.1%} of exact match, expected at least "
            f"{MIN_MARGIN:.0%}: the model or its training is broken; look at {paths.root / 'loss.png'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("runs/demo")
    parser.add_argument("--dir", type=Path, default=default, help="output folder (default %(default)s)")
    folder = parser.parse_args().dir
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds like Ctrl-C, so that Ray and the training end too
    finish(demo(folder), DemoFolder(folder))


if __name__ == "__main__":
    run_cli(main)
