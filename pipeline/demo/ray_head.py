"""A Ray head node with its job server on this machine, started on free ports and stopped by its process id."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from model.errors import UserError
from pipeline.config import REPOSITORY
from pipeline.demo.processes import free_ports, kill_process_tree, with_our_programs

START_S, STOP_S = 90, 15
ATTEMPTS = 3  # to start a head; on a busy machine, Ray's own time limits can end a head before it is ready
OBJECT_STORE_BYTES = 200_000_000

Options = Mapping[str, str | int | Path]


class RayHead:
    """A running Ray head. `environment` holds the variables with which `ray job` connects to it."""

    def __init__(self, *, scratch: Path, log: Path, options: Options, settings: Mapping[str, str]) -> None:
        self.port, dashboard, client, agent, self.metrics_port = free_ports(5)
        self.log, self.settings = log, settings
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        ports = {"port": self.port, "dashboard-port": dashboard, "ray-client-server-port": client}
        ports |= {"dashboard-agent-listen-port": agent, "metrics-export-port": self.metrics_port}
        self.process = self.start_node("--head", {**ports, "temp-dir": scratch, **options})

    def start_node(self, flag: str, options: Options) -> subprocess.Popen[bytes]:
        """Start the head, or another node of its cluster, in its own session, so that Ctrl-C does not reach it."""
        # 0 means any port. Ray's default range for workers contains the free ports chosen above.
        workers = {"min-worker-port": 0, "max-worker-port": 0}
        options = {"object-store-memory": OBJECT_STORE_BYTES, "log-color": "false", **workers, **options}
        environment = with_our_programs({**self.environment, **self.settings})
        del environment["RAY_ADDRESS"]  # otherwise `ray start` looks for a cluster there
        with self.log.open("ab") as output:
            return subprocess.Popen(
                ["ray", "start", flag, "--block", "--disable-usage-stats"]
                + [f"--{name}={value}" for name, value in options.items()],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> bool:
        """Wait until the job server answers. Return False if the head ends or does not answer in time."""
        deadline = time.monotonic() + START_S
        environment = with_our_programs(self.environment)
        while subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def stop(self) -> None:
        """End the head and all of its processes. `ray stop` would end every Ray on this machine."""
        if self.process.poll() is None:
            descendants = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_S)
            for process in descendants:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.kill()

    def kill(self) -> None:
        kill_process_tree(self.process.pid)
        self.process.wait()


@contextlib.contextmanager
def ray_head(
    log: Path, *, options: Options | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """Start a Ray head for the duration of the block.

    Args:
        log: file to which Ray's output is appended
        options: additional options of `ray start`, by name
        settings: environment variables for Ray's own processes

    Raises: UserError if no head starts.
    """
    scratch = Path(tempfile.mkdtemp(prefix="emma-", dir="/tmp"))  # short: paths of Ray's sockets have at most 107 bytes
    try:
        for _ in range(ATTEMPTS):
            head = RayHead(scratch=scratch, log=log, options=options or {}, settings=settings or {})
            try:
                if head.wait_until_ready():
                    yield head
                    return
            finally:
                head.stop()
        raise UserError(f"Ray: the head did not start in {ATTEMPTS} attempts of at most {START_S} s; see {log}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
