"""The whole chain on this machine's CPU, for real: raw data, shards, training, a kill, resuming, answers.

    make demo                                # or, in an environment where the project is installed:
    python -m pipeline.demo --dir runs/demo

Everything it makes is under that folder, and is made anew each time. Nothing is downloaded. It ends with an error
unless the trained model answers far more about held-out pictures than it would by guessing or without looking.
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
from pipeline.demo.processes import Commands, kill_family
from pipeline.demo.ray_head import ray_head
from pipeline.demo.report import SHEET_COLUMNS, Results, sample_answers, summary, table
from pipeline.evaluate import Question, ask, commonest_answers, read_questions, shuffle_images
from pipeline.generate import load
from pipeline.metrics.figures import draw_answers, draw_run
from pipeline.metrics.history import read_history
from pipeline.recipe import load_recipe
from preprocess.atomic import write_json
from preprocess.demo.mix import HELD_OUT, MODEL, QUESTIONS, TOKENIZER, write_mix
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest

RECIPE = "pipeline/recipes/demo.toml"
MIX = "preprocess/mixes/demo.toml"
RANKS = 2
SAMPLES_PER_SHARD = 512
LEAST_MARGIN = 0.25  # of exact match, over each control; less means that the model or its training is wrong
MARK = ".emma-demo"  # in a folder that the demo made, and may therefore wipe
JOB = "emma-demo"
STEP_LINE = re.compile(r"step +(\d+)/")
THREADS = {"OMP_NUM_THREADS": "1"}  # of each rank
SHOWN_STEPS = 50  # of the training's lines, one in so many
RAY_NOISE = re.compile(r"^$|^-+$|\.py:\d+ -- |Next steps|Query the|Request the|Tailing|^ +ray job")


class Places:
    """Where the stages leave what they make; absolute, since a Ray job runs in a copy of the checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.raw, self.shards, self.run = self.root / "raw", self.root / "shards", self.root / "run"
        self.model, self.untrained, self.logs = self.root / "model", self.root / "untrained", self.root / "logs"

    @property
    def held_out(self) -> Path:
        return self.raw / HELD_OUT


class Clock:
    """Announces the stages and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        print(f"\n[{name}] {what}", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        print(f"[{name}] took {self.seconds[name]:.1f} s", flush=True)

    def with_total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.monotonic() - self.began}


def demo(folder: Path) -> Results:
    """Run every stage in `folder`, which is wiped first. Raises: UserError if a stage fails."""
    places, clock = Places(folder), Clock()
    start_afresh(places.root)
    commands = Commands(places.logs)
    with clock.stage("data", "photographs, rendered scenes and text-only dialogues, in three source formats"):
        for source, rows in write_mix(places.raw).items():
            print(f"  {source:<6} {rows:>5} rows")
    with clock.stage("shards", "a Ray job turns annotations and pictures into WebDataset tars"):
        job_s = build_shards(commands, places)
        manifest = Manifest.load(places.shards)
    with clock.stage("train", f"DeepSpeed ZeRO-3 on {RANKS} ranks, killed half-way; the same command resumes"):
        killed_at = train_with_a_kill(commands, places)
    with clock.stage("answers", "export, load again, and ask about pictures that were never seen"):
        export(commands, places)
        questions = read_questions(places.held_out / QUESTIONS)
        answers = answer(places, questions)
    return Results(
        seconds=clock.with_total(),
        samples=manifest.counts["samples"],
        shards_job_s=job_s,
        rejects=manifest.rejects_by_reason,
        global_batch=load_recipe(RECIPE, overrides(places)).optim.global_batch,
        killed_at_step=killed_at,
        history=read_history(places.run),
        questions=questions,
        answers=answers,
    )


def start_afresh(folder: Path) -> None:
    """Wipe what an earlier demo made. Raises: UserError rather than touch a folder of somebody else's."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise UserError(f"--dir {folder} is not empty and was not made by the demo; choose another folder")
        print(f"{folder} is an earlier demo's: wiped, to start afresh", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


# -- Shards ------------------------------------------------------------------------------------------------------------


def build_shards(commands: Commands, places: Places) -> float:
    """Submit the job, check how it ended, list what was rejected; the seconds that the job took."""
    program: list[str | Path] = ["python", "preprocess/build_shards.py", MIX, "--model", MODEL]
    program += ["--root", places.raw, "--out", places.shards, "--tokenizer", places.raw / TOKENIZER]
    program += ["--samples-per-shard", str(SAMPLES_PER_SHARD)]
    print("  $ ray start --head --block …", flush=True)
    with ray_head(places.logs / "ray_head.log") as head:
        began = time.monotonic()
        submit = ["ray", "job", "submit", "--submission-id", JOB, "--working-dir", ".", "--", *program]
        commands.run("ray_job", submit, keep=lambda line: not RAY_NOISE.search(line), **head.environment)
        job_s = time.monotonic() - began
        # A job that was stopped leaves `submit` without an error; its status tells.
        status = commands.run("ray_status", ["ray", "job", "status", JOB], keep=lambda _: False, **head.environment)
    if not any("succeeded" in line for line in status):
        raise UserError(f"the Ray job did not succeed; {places.logs} tells more")
    print("  the job succeeded; rows that it rejected:")
    for line in ShardFolder(places.shards).rejects.read_text(encoding="utf-8").splitlines():
        reject = json.loads(line)
        print(f"    {reject['source']:<5} row {reject['row']:<5} {reject['reason']:<28} {reject['detail']}")
    return job_s


# -- Training ----------------------------------------------------------------------------------------------------------


def overrides(places: Places) -> list[str]:
    return [f"data.shards={places.shards}", f"run.dir={places.run}"]


def train_with_a_kill(commands: Commands, places: Places) -> int:
    """Train, SIGKILL every process of it half-way, and give the same command again; the last step before the kill."""
    steps = load_recipe(RECIPE, overrides(places)).steps
    assert steps is not None, f"{RECIPE} says how many steps"
    command = ["torchrun", "--standalone", f"--nproc-per-node={RANKS}", "-m", "pipeline.train", RECIPE]
    command += overrides(places)
    killed_at = train_until(commands, command, steps // 2)
    if not (places.run / "checkpoints" / "latest").exists():
        raise UserError(f"no checkpoint by step {killed_at}; {places.logs / 'train.log'} tells more")
    commands.run("train", command, keep=_is_news, **THREADS)
    outcome = json.loads((places.run / "outcome.json").read_text(encoding="utf-8"))
    if outcome["outcome"] != "done":
        raise UserError(f"the resumed training is {outcome['outcome']!r}: {outcome['reason']}")
    return killed_at


def train_until(commands: Commands, command: Sequence[str], last_step: int) -> int:
    """Start the training and kill it at that step, without warning. Raises: UserError if it ends before."""
    with commands.running(command, **THREADS) as process:
        for line in commands.lines("train", process):
            if _is_news(line):
                commands.show(line)
            step = _step_of(line)
            if step is not None and step >= last_step:
                killed = kill_family(process.pid)
                print(f"  SIGKILL to all {killed} processes of the training, at step {step}", flush=True)
                return step
    raise UserError(f"the training ended by itself before step {last_step}: {commands.end_of('train')}")


def _step_of(line: str) -> int | None:
    found = STEP_LINE.match(line)
    return int(found[1]) if found else None


def _is_news(line: str) -> bool:
    """Every line of the training but the steps', and one in so many of those."""
    step = _step_of(line)
    return bool(line) if step is None else step == 1 or step % SHOWN_STEPS == 0


# -- Answers -----------------------------------------------------------------------------------------------------------


def export(commands: Commands, places: Places) -> None:
    python = [sys.executable, "-m", "pipeline.export"]
    start: list[str | Path] = ["--untrained", RECIPE, places.untrained, *overrides(places)]
    commands.run("export", [*python, places.run, places.model], _names(places.model))
    commands.run("export", [*python, *start], _names(places.untrained))


def _names(place: Path) -> Callable[[str], bool]:
    return lambda line: line.startswith(str(place))


def answer(places: Places, questions: Sequence[Question]) -> dict[str, Sequence[str]]:
    """By whom the questions were answered -> the answers."""
    torch.set_num_threads(1)  # on matrices this small, more of them mostly wait for each other
    trained, untrained = (load(folder, "cpu") for folder in (places.model, places.untrained))
    print(f"  {len(questions)} questions about {len({q.image for q in questions})} pictures, three times")
    return {
        "trained": ask(*trained, questions, places.held_out),
        "untrained": ask(*untrained, questions, places.held_out),
        "commonest": commonest_answers(questions),
        "shuffled": ask(*trained, shuffle_images(questions, seed=0), places.held_out),
    }


def finish(results: Results, places: Places) -> None:
    """Write the report. Raises: UserError if the model did not learn."""
    write_json(places.root / "summary.json", summary(results))
    draw_run(results.history, places.root / "loss.png")
    draw_answers(sample_answers(results, places.held_out), places.root / "answers.png", columns=SHEET_COLUMNS)
    print(f"\n{table(results)}\n\n{places.root}: summary.json, loss.png, answers.png, model/ (ask it yourself:")
    print(f"  python -m pipeline.generate {places.model} --image PICTURE --prompt QUESTION)", flush=True)
    if results.margin < LEAST_MARGIN:
        raise UserError(
            f"the trained model beats the best control by {results.margin:.1%} of exact match, expected at least "
            f"{LEAST_MARGIN:.0%}: the model or its training is wrong; {places.root / 'loss.png'} may tell which"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("runs/demo")
    parser.add_argument("--dir", type=Path, default=default, help="everything goes there (default %(default)s)")
    folder = parser.parse_args().dir
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: Ray and the training end too
    finish(demo(folder), Places(folder))


if __name__ == "__main__":
    run_cli(main)
