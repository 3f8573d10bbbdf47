"""A fork server: a process that imports torch and DeepSpeed once and then forks for each program that a test runs.

Importing torch, DeepSpeed and timm takes six seconds of CPU time, and most test programs need these packages. The
server starts no thread, because its forks would lack that thread. The server does not import modules of this
repository: every program imports them itself, as a new process would.

Programs run on the CPU only. Tests of process start-up use `run_python` and `torchrun` of `tests.support.launch`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, cast

REPOSITORY = Path(__file__).parents[2]
IMPORTED = ("torch", "timm", "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "tokenizers")
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # CUDA does not work in forks
MAX_REQUEST_BYTES = 1 << 17
SHUTDOWN_S = 30  # from SIGTERM to SIGKILL for the remaining ranks, as in torchrun


class ForkedProgram:
    """A program that runs in a fork of the server. Has the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], *, cwd: Path, ranks: int, merge_errors: bool
    ) -> None:
        self.arguments = arguments
        self.returncode: int | None = None
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `communicate`)
        self._stderr = self._stdout if merge_errors else tempfile.TemporaryFile()  # noqa: SIM115
        # SOCK_SEQPACKET preserves message boundaries.
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "arguments": arguments,
            "environment": {**os.environ, **CPU_ONLY, **environment},
            "cwd": str(cwd),
            "ranks": ranks,
        }
        descriptors = [self._stdout.fileno(), self._stderr.fileno(), status.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
        status.close()
        self.pid = int(self._read_status())

    def _read_status(self) -> str:
        message = self._status.recv(64)
        assert message, "the fork server has died"
        return message.decode()

    def poll(self) -> int | None:
        """Return the exit code of the program, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the program to end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: The program did not end within `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
            self.returncode = int(self._read_status())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the program to end. Return its stdout and stderr. With `merge_errors`, stderr is part of stdout."""
        self.wait(timeout)
        stdout = _read_and_close(self._stdout)
        return stdout, "" if self._stderr is self._stdout else _read_and_close(self._stderr)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _read_and_close(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


@functools.cache
def _server() -> socket.socket:
    """Start one server per test process. Return the request socket; closing the socket ends the server."""
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
            cwd=REPOSITORY,
            env={**os.environ, **CPU_ONLY, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    def stop() -> None:
        requests.close()
        process.wait()

    atexit.register(stop)
    return requests


# -- In the server -----------------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request until the request socket is closed.

    Returns only in the forked processes that run a program, with the arguments of that program.
    """
    for name in IMPORTED:
        __import__(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, (
        "the server must have one thread, because forks lack the other threads"
    )
    gc.freeze()  # otherwise a garbage collection in a fork would copy the memory pages of all imported objects
    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            return start_program(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def reap(*_: object) -> None:
    """Collect the exit statuses of ended forks, which also adds their CPU time to that of the server."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start_program(request: dict, stdout: int, stderr: int, status: int) -> list[str]:
    """Fork the program, report its process id and exit code on `status`, and exit.

    Returns only in the forked program, with its arguments.
    """
    pid = os.fork()
    if pid:
        os.write(status, str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, str(code).encode())
        os._exit(0)
    os.close(status)
    for source, target in ((stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    os.close(stdout)
    if stderr != stdout:
        os.close(stderr)
    os.environ.clear()
    os.environ.update(request["environment"])
    if encoding := os.environ.get("PYTHONIOENCODING"):  # Python itself reads it only at its start
        cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding=encoding, errors="strict")
    os.chdir(request["cwd"])
    if request["ranks"]:
        launch_ranks(request["ranks"])
    return request["arguments"]


def launch_ranks(count: int) -> None:
    """Fork `count` ranks with the environment variables that torchrun sets, wait for the ranks, and exit.

    Returns only in the forked ranks. If a rank fails, the launcher ends the other ranks and exits with code 1, as
    torchrun does.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    pids = set[int]()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        pids.add(pid)
    failed = False

    def kill_remaining(*_: object) -> None:
        for remaining in pids:
            os.kill(remaining, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill_remaining)
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not failed:
            failed = True
            print(f"rank {pid} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
            for other in pids:
                os.kill(other, signal.SIGTERM)
            signal.alarm(SHUTDOWN_S)
    os._exit(failed)


def run_as_main(arguments: list[str]) -> None:
    """Run in this process what `python ARGUMENTS` would run: -m MODULE, -c CODE or a script."""
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    run_as_main(serve(socket.socket(fileno=int(sys.argv[1]))))
