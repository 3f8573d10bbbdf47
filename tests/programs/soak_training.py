"""Soak test of training: kill ranks at random moments and at every stage of a save, and damage checkpoints.

    python -m tests.programs.soak_training --kills 30 --seed 1

After each kill the same command runs again, sometimes after the newest checkpoint has been damaged. At the end, the
weights, the moments and the losses of every step must be bit-identical to those of an uninterrupted run, which shows
that no sample was skipped or seen twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from pipeline.checkpoint.folder import folder_name, list_steps
from pipeline.checkpoint.layout import Layout
from pipeline.zero import KINDS
from tests.programs.killed_training import Stages
from tests.support.launch import finish, kill_all, torchrun
from tests.support.tiny_data import TINY_RECIPE, build_shards, write_raw_data

STEPS = 24  # four epochs
STAGES = [name for name in vars(Stages) if not name.startswith("_")]
DAMAGES = ("a flipped bit", "a truncated file", "a deleted file", "no `latest`")
KILLED = "exitcode  : -9"  # line in torchrun's report about a rank that was killed with SIGKILL
LIFE_S = 300.0  # longest time for one launch; a launch that takes longer fails the test


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    text = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(_parse, text) if line is not None]


def _parse(line: str) -> dict | None:
    """Parse a line of metrics.jsonl. Return None if a kill truncated the line."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def losses(run: Path) -> dict[int, set[tuple]]:
    """Return the distinct values logged for each step. A repeated step must have logged the same values again."""
    values: dict[int, set[tuple]] = {}
    for line in lines(run):
        if "event" not in line:
            values.setdefault(line["step"], set()).add((line["loss/text"], line["loss/align"], line["optim/grad_norm"]))
    return values


def end_state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    folder = run / "checkpoints" / folder_name(STEPS)
    layout = Layout.load(folder)
    return {(kind, name): tensor for kind in KINDS for name, tensor in layout.assemble(folder, kind).items()}


def kill_sometime(process: subprocess.Popen[str], run: Path, everything: bool, rng: random.Random) -> bool:
    """Kill all processes or one rank at a random time after the first step. Return whether any process was alive."""
    before, until = len(lines(run)), time.monotonic() + LIFE_S
    while len(lines(run)) <= before + 1 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=rng.uniform(0.0, 3.0))
    ranks = [p for p in psutil.Process(process.pid).children() if process.poll() is None]
    if not ranks:
        return False
    if everything:
        kill_all(process)
    else:
        rng.choice(ranks).kill()
    return True


def one_life(command: list[str | Path], run: Path, rng: random.Random) -> tuple[str, bool]:
    """Launch the training once and interrupt it. Return the kind of interruption and whether the run still finished."""
    way = rng.choice(["all killed", "one rank killed", *STAGES])
    program = ["tests.programs.killed_training", way] if way in STAGES else ["pipeline.train"]
    process = torchrun(2, ["-m", *program, *command])
    if way not in STAGES:
        kill_sometime(process, run, way == "all killed", rng)
    if process.returncode is None:
        output, _ = process.communicate(timeout=LIFE_S)
        assert process.returncode == 0 or KILLED in output, f"{way}: ended with an error of its own:\n{output}"
    return way, process.returncode == 0


def damage(run: Path, rng: random.Random) -> str | None:
    """Damage the newest of several checkpoints in 40 % of the calls. Return the kind of damage or None."""
    steps = list_steps(run / "checkpoints")
    if len(steps) < 2 or rng.random() < 0.6:
        return None
    what = rng.choice(DAMAGES)
    victim = rng.choice(sorted((run / "checkpoints" / folder_name(steps[-1])).iterdir()))
    content = bytearray(victim.read_bytes())
    if what == "no `latest`":
        (run / "checkpoints/latest").unlink(missing_ok=True)
    elif what == "a deleted file":
        victim.unlink()
    elif what == "a truncated file":
        victim.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    return what


def one_training(command: list[str | Path], run: Path, rng: random.Random) -> tuple[Counter[str], Counter[str]]:
    """Launch the training until it finishes. Return how often each kind of kill and each kind of damage occurred."""
    killed, damaged = Counter[str](), Counter[str]()
    done = False
    while not done:
        way, done = one_life([*command, f"run.dir={run}"], run, rng)
        killed[way] += not done
        what = None if done else damage(run, rng)
        damaged[what or "none"] += not done
        steps = list_steps(run / "checkpoints")
        print(f"{'done' if done else way}; checkpoints of steps {steps}; damage: {what}", flush=True)
    return killed, damaged


def soak(folder: Path, kills: int, seed: int) -> None:
    rng, begun = random.Random(seed), time.monotonic()
    shards = build_shards(write_raw_data(folder / "raw", num_images=26, num_text_only=9), folder / "shards")
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    command: list[str | Path] = [folder / "tiny.toml", f"data.shards={shards}", f"steps={STEPS}"]
    command += ["checkpoint.every_steps=3", "checkpoint.keep_last=3"]
    finish(torchrun(2, ["-m", "pipeline.train", *command, f"run.dir={folder / 'straight'}"]), timeout=LIFE_S)
    expected_state, expected_losses = end_state(folder / "straight"), losses(folder / "straight")
    killed, damaged, trainings = Counter[str](), Counter[str](), 0
    while killed.total() < kills:
        run = folder / f"run-{trainings}"
        more, hurt = one_training(command, run, rng)
        killed, damaged, trainings = killed + more, damaged + hurt, trainings + 1
        state = end_state(run)
        assert state.keys() == expected_state.keys()
        different = [name for name in state if not torch.equal(state[name], expected_state[name])]
        assert different == [], "the weights or moments differ"
        assert losses(run) == expected_losses, "the losses differ"
        shutil.rmtree(run)
    minutes = (time.monotonic() - begun) / 60
    print(f"{killed.total()} kills in {trainings} runs, {minutes:.0f} minutes: {dict(killed)}")
    print(f"damage: {dict(damaged)}")
    print("the weights, moments and losses are bitwise equal")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="stop after this many kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default %(default)s)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), parsed.kills, parsed.seed)
