"""Shard builds on a real Ray cluster in which workers, drivers, jobs or nodes are killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from PIL import Image
from skimage import data as photographs

from model.errors import ExitCode
from tests.programs import soak_shards
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import run_python
from tests.support.ray_cluster import RayCluster, ray_cluster, wait_until, workers_of_node
from tests.support.shard_builds import arguments, build_in_process, contents, dialogue_row, write_mix

SCRIPT = "preprocess/build_shards.py"
NUM_ROWS, SAMPLES_PER_SHARD = 600, 20
ALL_BUT_ONE = 29  # shards
STOPPED = "stopped; finished shards are kept, and the same command continues with the missing ones"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data root in which each row has its own image."""
    root = tmp_path_factory.mktemp("many") / "root"
    write_mix(root, [{"name": "photographs", "format": "llava", "annotations": "rows.json"}])
    rows = [dialogue_row(i) | {"image": f"{i}.jpg"} for i in range(NUM_ROWS)]
    Image.fromarray(photographs.rocket()).save(root / "rocket.jpg")
    for row in rows:
        os.link(root / "rocket.jpg", root / str(row["image"]))
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> Path:
    """Return the shard set that an uninterrupted build without Ray writes."""
    return build_in_process(root, root.with_name("expected"), gpt_neox(), samples_per_shard=SAMPLES_PER_SHARD)


def command(root: Path, out: Path, **options: Any) -> list[str]:
    return arguments(root, out, gpt_neox(), samples_per_shard=SAMPLES_PER_SHARD, **options)


@contextlib.contextmanager
def held_up(root: Path) -> Iterator[None]:
    """Replace one of the last images with a FIFO, so that a build waits for this image until the `with` block ends."""
    image, pipe = root / "590.jpg", root.with_name("pipe")
    data = image.read_bytes()
    image.unlink()
    os.mkfifo(image)
    os.link(image, pipe)
    try:
        yield
    finally:
        image.unlink()
        image.write_bytes(data)
        with contextlib.suppress(OSError), os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb") as waiting:
            os.set_blocking(waiting.fileno(), True)
            waiting.write(data)
        pipe.unlink()


def wait_for_shards(driver: subprocess.Popen[str], out: Path, count: int) -> None:
    wait_until(lambda: len(list(out.glob("shard-*.json"))) >= count, driver)


def finish(driver: subprocess.Popen[str]) -> str:
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    return output


def test_a_build_survives_killed_workers_and_exports_its_progress_as_metrics(
    cluster: RayCluster, root: Path, expected: Path, tmp_path: Path
) -> None:
    with held_up(root):
        driver = cluster.driver(SCRIPT, *command(root, tmp_path / "out"))
        metrics: dict[str, float] = {}

        def metrics_show_all_but_one() -> bool:
            metrics.update(cluster.metrics("ray_emma_"))
            return metrics.get("ray_emma_dialogues_done") == ALL_BUT_ONE * SAMPLES_PER_SHARD

        wait_until(metrics_show_all_but_one, driver)
        for pid in cluster.workers("build_shard"):
            os.kill(pid, signal.SIGKILL)
    finish(driver)
    assert contents(tmp_path / "out") == contents(expected)
    assert metrics["ray_emma_rejects"] == 0
    assert min(metrics["ray_emma_dialogues_per_s"], metrics["ray_emma_seconds_left"]) > 0


def test_the_error_after_repeated_worker_crashes_names_the_last_image(
    cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    crumb = tmp_path / "out/.work/shard-00029.crumb.tmp"
    with held_up(root):
        driver = cluster.driver(SCRIPT, *command(root, tmp_path / "out"))
        wait_for_shards(driver, tmp_path / "out", ALL_BUT_ONE)  # only the worker of the last shard remains
        for death in range(4):
            wait_until(lambda: crumb.exists() and "590.jpg" in crumb.read_text(), driver)
            if death < 3:
                crumb.unlink()
            for pid in cluster.workers("build_shard"):
                os.kill(pid, signal.SIGSEGV)
        output, _ = driver.communicate(timeout=60)
    assert driver.returncode == ExitCode.USER_ERROR, output
    complaint = "error: shard-00029: its process died 4 times, the last time at row 590 of photographs, image 590.jpg ("
    assert output.splitlines()[-1].startswith(complaint)


def test_a_task_that_keeps_running_out_of_memory_fails_after_four_attempts(tmp_path: Path) -> None:
    """Set Ray's memory limit so low that it kills the task. A FIFO in place of an image blocks the task until then."""
    root = tmp_path / "root"
    write_mix(root, [{"name": "photographs", "format": "llava", "annotations": "rows.json"}])
    (root / "rows.json").write_text(json.dumps([dialogue_row(0) | {"image": "0.jpg"}]))
    os.mkfifo(root / "0.jpg")
    full = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "100"}
    done = run_python(SCRIPT, *command(root, tmp_path / "out", workers=1), timeout=120, RAY_ADDRESS="", **full)
    assert done.returncode == ExitCode.USER_ERROR, done.stderr
    assert "error: shard-00000: its process died 4 times, the last time at " in done.stderr.splitlines()[-1]
    assert "the machine ran out of memory: give fewer --workers" in done.stderr.splitlines()[-1]


def test_a_build_survives_the_loss_of_a_node(cluster: RayCluster, root: Path, expected: Path, tmp_path: Path) -> None:
    node = cluster.add_node()
    with held_up(root):
        driver = cluster.driver(SCRIPT, *command(root, tmp_path / "out"))
        wait_until(lambda: workers_of_node(node, "build_shard"), driver)
        cluster.lose_node(node)
        wait_for_shards(driver, tmp_path / "out", ALL_BUT_ONE)
    finish(driver)
    assert contents(tmp_path / "out") == contents(expected)


def test_a_killed_build_resumes_without_rebuilding_finished_shards(
    cluster: RayCluster, root: Path, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with held_up(root):
        driver = cluster.driver(SCRIPT, *command(root, out))
        wait_for_shards(driver, out, ALL_BUT_ONE)
        driver.kill()
        driver.communicate()
        wait_until(lambda: not cluster.workers("build_shard"))  # Ray ends the tasks of a killed driver
    (out / f"shard-00029.tar.{uuid.uuid4().hex}.tmp").write_text("left by a killed worker")
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert not (out / "manifest.json").exists()
    output = finish(cluster.driver(SCRIPT, *command(root, out)))
    assert contents(out) == contents(expected)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards were built again"
    assert f"{len(finished) * SAMPLES_PER_SHARD}/{NUM_ROWS} dialogues" in output


def test_a_stopped_ray_job_resumes_without_rebuilding_finished_shards(
    cluster: RayCluster, root: Path, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(root, out, workers=1)
    with held_up(root):
        cluster.submit("submit", "--no-wait", "--submission-id", "stopped", "--", SCRIPT, *words)
        wait_until(lambda: list(out.glob("shard-*.json")))
        assert cluster.submit("stop", "stopped").returncode == 0
    assert STOPPED in cluster.submit("logs", "stopped").stdout
    assert cluster.statuses().count("STOPPED") == 1
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert not (out / "manifest.json").exists()
    assert cluster.submit("submit", "--", SCRIPT, *words).returncode == 0
    assert contents(out) == contents(expected)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards were built again"


def test_an_interrupted_build_says_that_the_same_command_continues_it(
    cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    with held_up(root):
        driver = cluster.driver(SCRIPT, *command(root, tmp_path / "out"))
        wait_for_shards(driver, tmp_path / "out", 1)
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=60)
    assert driver.returncode == ExitCode.INTERRUPTED, output
    assert STOPPED in output
    assert "Traceback" not in output
    assert list((tmp_path / "out").glob("shard-*.json"))


@pytest.mark.parametrize("where", ["in this process", "on a Ray of its own", "on a cluster"])
def test_a_terminated_build_says_that_the_same_command_continues_it(
    cluster: RayCluster, root: Path, tmp_path: Path, where: str
) -> None:
    out = tmp_path / "out"
    own = {"RAY_ADDRESS": ""} if where == "on a Ray of its own" else {}
    words = command(root, out, workers=0) if where == "in this process" else command(root, out)
    with held_up(root):
        driver = cluster.driver(SCRIPT, *words, **own)
        wait_for_shards(driver, out, 1)
        driver.terminate()
        output, _ = driver.communicate(timeout=60)
    assert driver.returncode == ExitCode.TERMINATED, output
    assert output.count(STOPPED) == 1
    assert not re.search("Traceback|SIGTERM|\\*\\*\\*", output), output
    assert not (out / "manifest.json").exists()


def test_the_soak_test_counts_a_kill_only_if_the_process_was_alive() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    victim, ended = (subprocess.Popen(sleeper, text=True) for _ in range(2))
    ended.kill()
    ended.wait()
    assert soak_shards.kill_if_alive(victim.pid)
    while psutil.Process(victim.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not soak_shards.kill_if_alive(victim.pid), "a zombie process must not count as alive"
    victim.wait()
    nobody: Any = SimpleNamespace(workers=lambda name: [ended.pid], nodes=[ended])
    for kind in soak_shards.VICTIMS:
        assert not soak_shards.kill(kind, nobody, ended), "a kill after the end of the build must not count"


def test_a_build_terminated_while_ray_starts_says_that_it_can_continue(root: Path, tmp_path: Path) -> None:
    program = [sys.executable, SCRIPT, *command(root, tmp_path / "out", workers=1)]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    driver = subprocess.Popen(program, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: psutil.Process(driver.pid).children(), driver)
    driver.terminate()
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == ExitCode.TERMINATED, output
    assert output.splitlines()[-1] == STOPPED
