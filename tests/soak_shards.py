"""Kills builds at random moments, driver, worker or the whole Ray head, and compares what is there in the end.

    python -m tests.soak_shards --kills 20 --seed 1

After each kill the same command runs again on what was left. In the end every tar must equal that of a build without
accidents, no temporary file may be left, and no shard that was finished may have been built again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from PIL import Image
from skimage import data as photographs

from tests.golden_tokenizer import gpt_neox
from tests.ray_head import RayHead, ray_head
from tests.shard_builds import arguments, build_in_process, write_mix

NAMES = ("astronaut", "camera", "chelsea", "coffee", "rocket", "text")
NUM_ROWS, SAMPLES = 2400, 30
VICTIMS = ("driver", "worker", "head")


def write_photographs(root: Path) -> None:
    root.mkdir()
    rows = []
    for i in range(NUM_ROWS):
        name = f"{NAMES[i % 6]}-{i % 600}.jpg"
        if i < 600:
            Image.fromarray(getattr(photographs, NAMES[i % 6])()).convert("RGB").save(root / name)
        turns = [{"from": "human", "value": f"What is this? {i}"}, {"from": "gpt", "value": "A photograph."}]
        rows.append({"id": i, "image": name, "conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    write_mix(root, [{"name": "photographs", "format": "llava", "annotations": "rows.json"}])


def hashes(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}


def kill(victim: str, head: RayHead, driver: subprocess.Popen[str]) -> None:
    if victim == "driver":
        driver.kill()
    elif victim == "head":
        head.kill()
        driver.kill()  # it would wait for the head until its patience ends
    for pid in head.workers("build_shard") if victim == "worker" else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(signal.SIGKILL)


def one_life(head: RayHead, command: list[str], victim: str, after_s: float) -> tuple[bool, bool]:
    """Whether the build reached its end, and whether somebody was killed before."""
    driver = head.driver("preprocess/build_shards.py", *command)
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=after_s)
    in_time = driver.poll() is None
    if in_time:
        kill(victim, head, driver)
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode in (0, -signal.SIGKILL), said
    while head.workers("build_shard"):
        time.sleep(0.1)
    return driver.returncode == 0, in_time


def soak(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    write_photographs(folder / "root")
    expected = hashes(build_in_process(folder / "root", folder / "expected", gpt_neox(), samples_per_shard=SAMPLES))
    killed = Counter[str]()
    builds = 0
    while killed.total() < kills:
        out = folder / f"build-{builds}"
        killed += one_build(out, arguments(folder / "root", out, gpt_neox(), samples_per_shard=SAMPLES), rng)
        assert hashes(out) == expected, "another set"
        builds += 1
    print(f"{dict(killed)} killed in {builds} builds: the same bytes, nothing left behind, nothing built again")


def one_build(out: Path, command: list[str], rng: random.Random) -> Counter[str]:
    """From nothing to the end, however many lives that takes. A new head for each one that is killed."""
    killed = Counter[str]()
    done, seen = False, dict[str, int]()
    while not done:
        with ray_head() as head:
            while not done and head.process.poll() is None:
                victim = rng.choice(VICTIMS)
                done, in_time = one_life(head, command, victim, rng.uniform(1.0, 7.0))
                again = {name for name, at in seen.items() if finished(out).get(name) != at}
                assert not again, f"built again: {again}"
                seen = finished(out)
                killed[victim] += in_time
                print(f"{victim if in_time else 'nobody'} killed, {len(seen)} shards finished", flush=True)
    return killed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), parsed.kills, parsed.seed)
