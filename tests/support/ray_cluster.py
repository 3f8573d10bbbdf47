"""A real Ray cluster for tests: the Ray head of the demo, and additional nodes that tests can kill."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pipeline.demo import ray_head as demo
from pipeline.demo.processes import free_ports, kill_process_tree, with_our_programs
from tests.support.launch import REPOSITORY

NODE_CPUS = 2
START_S, PATIENCE_S = 60, 120
NODE_OPTIONS: demo.Options = {"num-cpus": NODE_CPUS, "object-store-memory": 100_000_000}
FAST_REPORTS = {"RAY_health_check_period_ms": "500", "RAY_metrics_report_interval_ms": "500"}


class RayCluster:
    """A Ray head and its additional nodes."""

    def __init__(self, head: demo.RayHead) -> None:
        self.head = head
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.environment = with_our_programs(head.environment)

    @property
    def head_is_alive(self) -> bool:
        return self.head.process.poll() is None

    def add_node(self) -> subprocess.Popen[bytes]:
        """Start a node that Ray treats as another machine, and wait until the cluster includes the CPUs of the node."""
        agent, metrics = free_ports(2)
        ports = {"dashboard-agent-listen-port": agent, "metrics-export-port": metrics}
        self.nodes.append(self.head.start_node(f"--address=127.0.0.1:{self.head.port}", {**NODE_OPTIONS, **ports}))
        too_few = f"ray.cluster_resources().get('CPU', 0) < {NODE_CPUS * (1 + len(self.nodes))}"
        program = f"import ray, time; ray.init('127.0.0.1:{self.head.port}', logging_level='error')\n"
        waited = self.run(sys.executable, "-c", f"{program}while {too_few}: time.sleep(0.1)", timeout=START_S)
        assert waited.returncode == 0, waited.stderr
        return self.nodes[-1]

    def lose_node(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once, as a power failure does."""
        self.nodes.remove(node)
        kill_process_tree(node.pid)
        node.wait()

    def submit(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `ray job WORDS` in the checkout and wait for its end."""
        return self.run("ray", "job", *words)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the latest value of each exported metric, or an empty dict while the exporter is not ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.head.metrics_port}/metrics", timeout=30) as page:
                lines = [line for line in page.read().decode().splitlines() if line.startswith(prefix)]
        except OSError:
            return {}
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def statuses(self) -> list[str]:
        """Return the statuses of all jobs of this cluster."""
        program = "from ray.job_submission import JobSubmissionClient as Client; "
        program += "print(*(job.status for job in Client().list_jobs()))"
        return self.run(sys.executable, "-c", program).stdout.split()

    def run(self, *words: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout, with the address of this cluster's job server in the environment."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def driver(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a Python program that uses this cluster, without waiting for its end, so that a test can kill it."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPOSITORY,
            env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.head.port}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self, task: str) -> list[int]:
        """Return the process ids of all workers in the cluster that are currently running this Ray task."""
        return [pid for node in (self.head.process, *self.nodes) for pid in workers_of_node(node, task)]


def workers_of_node(node: subprocess.Popen[bytes], task: str) -> list[int]:
    """Return the process ids of all workers on a node that are currently running this Ray task."""
    pids = []
    for process in psutil.Process(node.pid).children(recursive=True) if node.poll() is None else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::{task}"):
                pids.append(process.pid)
    return pids


def wait_until(done: Callable[[], object], driver: subprocess.Popen[str] | None = None) -> None:
    """Wait until `done` returns a true value. Fail after a time limit, or if the driver ends before that."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert driver is None or driver.poll() is None, f"the build ended too early: {driver.communicate()[0]}"
        if time.monotonic() > deadline:
            if driver:
                driver.kill()
            raise TimeoutError(f"the condition did not hold within {PATIENCE_S} s")
        time.sleep(0.05)


@contextlib.contextmanager
def ray_cluster(logs: Path) -> Iterator[RayCluster]:
    """Run a Ray cluster of one node for the duration of the `with` block."""
    with demo.ray_head(logs / "ray.log", options=NODE_OPTIONS, settings=FAST_REPORTS) as head:
        cluster = RayCluster(head)
        try:
            yield cluster
        finally:
            for node in list(cluster.nodes):
                cluster.lose_node(node)
