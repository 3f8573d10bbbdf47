"""Soak test of shard builds: kill processes of a build at random moments, and compare the resulting shard sets.

    python -m tests.programs.soak_shards --kills 20 --seed 1

The test kills the driver, the workers, the Ray head or another node of the cluster. A build must survive the loss of
workers and nodes. After the driver or the head was killed, the same command runs again. At the end, every tar must be
equal to that of an uninterrupted build, no temporary file may be left, and no finished shard may have been rebuilt. If
run as root, the test also builds on a disk that is too small.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
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

from model.errors import ExitCode
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import run_python
from tests.support.ray_cluster import RayCluster, ray_cluster, wait_until
from tests.support.shard_builds import arguments, build_in_process, write_mix

NAMES = ("astronaut", "camera", "chelsea", "coffee", "rocket", "text")
NUM_ROWS, SAMPLES = 2400, 30
VICTIMS = ("driver", "worker", "head", "node")
SURVIVED = ("worker", "node")


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


def kill(victim: str, cluster: RayCluster, driver: subprocess.Popen[str]) -> bool:
    """Kill a driver, worker, head or node. Return whether a running process was killed before the build ended."""
    if driver.poll() is not None:
        return False
    if victim == "worker":
        return kill_workers(cluster, driver)
    if victim == "node":
        node = cluster.nodes[0]
        lived = node.poll() is None
        cluster.lose_node(node)
        return lived
    if victim == "head":
        cluster.head.kill()  # the driver is killed as well, because it would wait for the head
    driver.kill()
    return driver.wait() == -signal.SIGKILL


def kill_workers(cluster: RayCluster, driver: subprocess.Popen[str]) -> bool:
    """Wait until workers build shards, and kill those workers. Return False if the build ends before that."""
    while driver.poll() is None:
        if sum(map(kill_if_alive, cluster.workers("build_shard"))):
            return True
        time.sleep(0.02)
    return False


def kill_if_alive(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def one_life(cluster: RayCluster, command: list[str], victim: str, after_s: float) -> tuple[bool, bool]:
    """Start the build and kill the victim. Return whether the build finished, and whether a process was killed."""
    driver = cluster.driver("preprocess/build_shards.py", *command)
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=after_s)
    killed = kill(victim, cluster, driver)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == (-signal.SIGKILL if killed and victim not in SURVIVED else 0), output
    wait_until(lambda: not cluster.workers("build_shard"))
    return driver.returncode == 0, killed


def soak(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    write_photographs(folder / "root")
    expected = build_in_process(folder / "root", folder / "expected", gpt_neox(), samples_per_shard=SAMPLES)
    killed = Counter[str]()
    builds = 0
    while killed.total() < kills:
        out = folder / f"build-{builds}"
        one_build(out, arguments(folder / "root", out, gpt_neox(), samples_per_shard=SAMPLES), rng, killed)
        assert hashes(out) == hashes(expected), "the sets differ"
        builds += 1
    summary = ", ".join(f"{killed[victim]} times a {victim}" for victim in VICTIMS)
    print(f"kills in {builds} builds: {summary}; equal bytes, no temporary files, no shard built twice")
    fill_a_disk(folder, expected)


def one_build(out: Path, command: list[str], rng: random.Random, killed: Counter[str]) -> None:
    """Restart the build until it finishes, with a new Ray head whenever the head was killed."""
    done, seen = False, dict[str, int]()
    while not done:
        with ray_cluster(out.parent) as cluster:
            while not done and cluster.head_is_alive:
                if not cluster.nodes:
                    cluster.add_node()
                victim = min(rng.sample(VICTIMS, len(VICTIMS)), key=lambda name: killed[name])
                done, hit = one_life(cluster, command, victim, rng.uniform(2.0, 9.0))
                again = {name for name, at in seen.items() if finished(out).get(name) != at}
                assert not again, f"finished shards were built again: {again}"
                seen = finished(out)
                killed[victim] += hit
                print(f"{victim if hit else 'nobody'} killed, {len(seen)} shards finished", flush=True)


def fill_a_disk(folder: Path, expected: Path) -> None:
    """Build on a disk that has space for half of the set. Then enlarge the disk and build again."""
    if os.geteuid():
        print("skipped the test with a full disk, because only root may mount a file system")
        return
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", disk], check=True)
    try:
        words = ["preprocess/build_shards.py", *arguments(folder / "root", disk / "out", gpt_neox(), workers=2)]
        words += ["--samples-per-shard", str(SAMPLES)]
        failed = run_python(*words, timeout=300, RAY_ADDRESS="")
        assert failed.returncode == ExitCode.USER_ERROR, failed.stdout + failed.stderr
        expected_error = (
            f"error: {disk / 'out'}: No space left on device; free some space, "
            "then run the same command again: finished shards are kept"
        )
        assert failed.stderr.splitlines()[-1] == expected_error, failed.stderr
        before = finished(disk / "out")
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
        done = run_python(*words, timeout=300, RAY_ADDRESS="")
        assert done.returncode == 0, done.stdout + done.stderr
        assert hashes(disk / "out") == hashes(expected), "the sets differ"
        assert before.items() <= finished(disk / "out").items(), "built again"
    finally:
        subprocess.run(["umount", disk], check=True)
    print(f"disk full after {len(before)} shards: one error line, and equal bytes after the disk was enlarged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="stop after this many kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default %(default)s)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), parsed.kills, parsed.seed)
