"""The programs that the demo runs, as a user would type them: commands, a Ray head, a training that is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from model.errors import UserError
from pipeline.engine import REPOSITORY

RAY_START_S, RAY_STOP_S = 90, 15
OBJECT_STORE_BYTES = 200_000_000

Words = Sequence[str | Path]


class Commands:
    """Runs commands in the checkout, this environment's programs first. Their whole output goes to a log each."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, log: str, words: Words, keep: Callable[[str], bool], **environment: str) -> list[str]:
        """All lines; shows those that `keep` chooses. Raises: UserError with the last ones if the command fails."""
        lines = []
        with self.running(words, **environment) as process:
            for line in self.lines(log, process):
                lines.append(line)
                if keep(line):
                    self.show(line)
        if process.returncode:
            raise UserError(f"{_typed(words)} ended with {process.returncode}: {self.end_of(log)}")
        return lines

    @contextlib.contextmanager
    def running(self, words: Words, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """The command, started; whoever leaves early, by an error or an interrupt, leaves nothing of it behind."""
        print(f"  $ {_typed(words)}", flush=True)
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=REPOSITORY,
            env=with_our_programs(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            yield process
        except BaseException:
            kill_family(process.pid)
            raise
        finally:
            process.wait()

    def lines(self, log: str, process: subprocess.Popen[str]) -> Iterator[str]:
        """What the process prints, until nobody holds its output any more."""
        assert process.stdout is not None
        with (self.logs / f"{log}.log").open("a", encoding="utf-8") as file, process.stdout:
            for line in process.stdout:
                file.write(line)
                yield line.rstrip()

    def show(self, line: str) -> None:
        print(f"  | {line}", flush=True)

    def end_of(self, log: str) -> str:
        path = self.logs / f"{log}.log"
        return f"{path} ends with\n" + "\n".join(path.read_text(encoding="utf-8").splitlines()[-15:])


def with_our_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and the given one; `python`, `ray` and `torchrun` are those of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, **environment}


def _typed(words: Words) -> str:
    """The command as a user in the checkout would type it."""
    shown = ["python" if word == sys.executable else str(word) for word in words]
    return " ".join(word.replace(f"{REPOSITORY}{os.sep}", "") for word in shown)


def kill_family(pid: int) -> int:
    """SIGKILL a process and all that it started, whatever their process groups; how many there were."""
    try:
        parent = psutil.Process(pid)
        children = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    for member in (parent, *children):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(children, timeout=10)
    return 1 + len(children)


# -- Ray ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_head(logs: Path) -> Iterator[dict[str, str]]:
    """A Ray head with a job server, on free ports; the environment in which `ray job` finds it.

    It is ended by its own process id: `ray stop` would end every Ray of the host.
    """
    scratch = tempfile.mkdtemp(prefix="emma-", dir="/tmp")  # short: the paths of Ray's sockets may have 107 characters
    port, dashboard, client, agent = free_ports(4)
    options: dict[str, str | int] = {"port": port, "dashboard-port": dashboard, "ray-client-server-port": client}
    options |= {"dashboard-agent-listen-port": agent, "min-worker-port": 0, "max-worker-port": 0}
    options |= {"object-store-memory": OBJECT_STORE_BYTES, "temp-dir": scratch, "log-color": "false"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    log = logs / "ray_head.log"
    with log.open("w", encoding="utf-8") as file:
        print("  $ ray start --head --block …", flush=True)
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--disable-usage-stats", *flags],
            cwd=REPOSITORY,
            env={name: value for name, value in with_our_programs(token).items() if name != "RAY_ADDRESS"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    environment = {**token, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        _wait_for_jobs(head, environment, log)
        yield environment
    finally:
        _end(head)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_jobs(head: subprocess.Popen[bytes], environment: Mapping[str, str], log: Path) -> None:
    deadline = time.monotonic() + RAY_START_S
    while not _answers(environment):
        if head.poll() is not None or time.monotonic() > deadline:
            state = "ended" if head.poll() is not None else f"does not answer after {RAY_START_S} s"
            raise UserError(f"the Ray head {state}; {log} tells more")
        time.sleep(0.5)


def _answers(environment: Mapping[str, str]) -> bool:
    asked = ["ray", "job", "list"]
    done = subprocess.run(asked, env=with_our_programs(environment), capture_output=True, check=False)
    return done.returncode == 0


def _end(head: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=RAY_STOP_S)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    head.kill()
    head.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
