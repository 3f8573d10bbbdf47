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
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.demo_processes import free_ports

REPOSITORY = Path(__file__).parents[1]
START_S, STOP_S = 60, 15


class RayHead:
    """Where the head listens, and the environment in which commands find it."""

    def __init__(self, scratch: Path) -> None:
        self.port, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
        }
        ports = {"port": self.port, "dashboard-port": dashboard, "ray-client-server-port": client}
        ports |= {"dashboard-agent-listen-port": agent, "min-worker-port": 0, "max-worker-port": 0}
        options = [f"--{name}={value}" for name, value in ports.items()]
        options += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={scratch}"]
        self.process = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--log-color=false", *options],
            cwd=REPOSITORY,
            env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while self.submit("list").returncode:
            assert self.process.poll() is None, f"the head ended: {self.process.communicate()[0]}"
            assert time.monotonic() < deadline, "the job server does not answer"
            time.sleep(0.5)

    def submit(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`ray job …`, run in the checkout."""
        return self.run("ray", "job", *words)

    def statuses(self) -> list[str]:
        """Of every job so far, as the SDK tells them."""
        program = "from ray.job_submission import JobSubmissionClient as Client; "
        program += "print(*(job.status for job in Client().list_jobs()))"
        return self.run(sys.executable, "-c", program).stdout.split()

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def driver(self, *words: str | Path) -> subprocess.Popen[str]:
        """A builder on this cluster that is a process of ours, so that it can be killed."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPOSITORY,
            env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.port}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self, name: str) -> list[int]:
        """Processes below the head that run a task of that name now."""
        found = []
        for process in self._below():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(f"ray::{name}"):
                    found.append(process.pid)
        return found

    def stop(self) -> None:
        descendants = self._below()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=STOP_S)
        self._kill(descendants)

    def kill(self) -> None:
        """The whole head, at once."""
        self._kill(self._below())

    def _kill(self, descendants: list[psutil.Process]) -> None:
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.communicate()

    def _below(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def ray_head() -> Iterator[RayHead]:
    scratch = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets are in it, 107 characters at most
    head = RayHead(scratch)
    try:
        head.wait_until_ready()
        yield head
    finally:
        head.stop()
        shutil.rmtree(scratch, ignore_errors=True)
