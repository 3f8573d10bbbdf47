"""A real Ray head with its job server, as `ray start --head --block` starts it: free ports, ended by its own pid."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pipeline.demo.processes import free_ports

REPOSITORY = Path(__file__).parents[2]
NODE_CPUS = 2
START_S, STOP_S, PATIENCE_S = 60, 15, 120
QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "500", "RAY_metrics_report_interval_ms": "500"}


class RayHead:
    """Where the head listens, and the environment in which commands find it."""

    def __init__(self, scratch: Path) -> None:
        self.port, dashboard, client, agent, self.metrics_port = free_ports(5)
        self.nodes: list[subprocess.Popen[str]] = []
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
        }
        ports = {"port": self.port, "dashboard-port": dashboard, "ray-client-server-port": client}
        ports |= {"metrics-export-port": self.metrics_port, "min-worker-port": 0, "max-worker-port": 0}
        self.process = self._start({**ports, "dashboard-agent-listen-port": agent, "temp-dir": scratch}, "--head")

    def _start(self, options: dict[str, object], *words: str) -> subprocess.Popen[str]:
        options = {"num-cpus": NODE_CPUS, "object-store-memory": 100_000_000, **options}
        return subprocess.Popen(
            ["ray", "start", "--block", "--log-color=false", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in options.items()]
            + list(words),
            cwd=REPOSITORY,
            env=QUICK_TO_NOTICE | {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def add_node(self) -> subprocess.Popen[str]:
        """A second machine of the cluster, as far as Ray can tell. Waits until Ray counts its CPUs."""
        agent, metrics = free_ports(2)
        options = {"address": f"127.0.0.1:{self.port}", "dashboard-agent-listen-port": agent}
        self.nodes.append(self._start({**options, "metrics-export-port": metrics}))
        count = f"ray.cluster_resources().get('CPU', 0) < {NODE_CPUS * (1 + len(self.nodes))}"
        program = f"import ray, time; ray.init('127.0.0.1:{self.port}', logging_level='error')\n"
        counted = self.run(sys.executable, "-c", f"{program}while {count}: time.sleep(0.1)", timeout=START_S)
        assert counted.returncode == 0, counted.stderr
        return self.nodes[-1]

    def lose_node(self, node: subprocess.Popen[str]) -> None:
        """All of its processes end at once, as when a machine loses its power."""
        self.nodes.remove(node)
        _kill(node, _below(node))

    def is_ready(self) -> bool:
        """Waits for it; False if it gave up, as it does where the machine is too busy for its own patience."""
        deadline = time.monotonic() + START_S
        while self.submit("list").returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def submit(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`ray job …`, run in the checkout."""
        return self.run("ray", "job", *words)

    def metrics(self, prefix: str) -> dict[str, float]:
        """The newest of each kind that a monitor would be given; none while the agent is not there yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as page:
                lines = [line for line in page.read().decode().splitlines() if line.startswith(prefix)]
        except OSError:
            return {}
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def statuses(self) -> list[str]:
        """Of every job so far, as the SDK tells them."""
        program = "from ray.job_submission import JobSubmissionClient as Client; "
        program += "print(*(job.status for job in Client().list_jobs()))"
        return self.run(sys.executable, "-c", program).stdout.split()

    def run(self, *words: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
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
        """A builder on this cluster that is a process of ours, so that it can be killed."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPOSITORY,
            env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.port}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self, name: str) -> list[int]:
        """Processes of the cluster that run a task of that name now."""
        return [pid for started in (self.process, *self.nodes) for pid in workers_below(started, name)]

    def stop(self) -> None:
        for node in list(self.nodes):
            self.lose_node(node)
        descendants = _below(self.process)
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=STOP_S)
        _kill(self.process, descendants)

    def kill(self) -> None:
        """The whole head, at once."""
        _kill(self.process, _below(self.process))


def wait_until(done: Callable[[], object], driver: subprocess.Popen[str] | None = None) -> None:
    """Fails if the driver, which is to be alive until then, ends before, and when patience does."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert driver is None or driver.poll() is None, f"the build ended too early: {driver.communicate()[0]}"
        if time.monotonic() > deadline:
            if driver:
                driver.kill()
            raise TimeoutError(f"waited {PATIENCE_S} s in vain")
        time.sleep(0.05)


def workers_below(started: subprocess.Popen[str], name: str) -> list[int]:
    found = []
    for process in _below(started):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::{name}"):
                found.append(process.pid)
    return found


def _kill(started: subprocess.Popen[str], descendants: list[psutil.Process]) -> None:
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    started.kill()
    started.communicate()


def _below(started: subprocess.Popen[str]) -> list[psutil.Process]:
    if started.poll() is not None:
        return []
    return psutil.Process(started.pid).children(recursive=True)


@contextlib.contextmanager
def ray_head() -> Iterator[RayHead]:
    scratch = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets are in it, 107 characters at most
    try:
        head = next((head for head in _attempts(scratch)), None)
        assert head, "no head of Ray comes up"
        try:
            yield head
        finally:
            head.stop()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _attempts(scratch: Path) -> Iterator[RayHead]:
    for _ in range(3):
        head = RayHead(scratch)
        if head.is_ready():
            yield head
        else:
            head.kill()
