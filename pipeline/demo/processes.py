"""Helpers to run commands as a user would type them, kill a process with its children, and find free ports."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from model.errors import UserError
from pipeline.config import REPOSITORY

Words = Sequence[str | Path]


class Commands:
    """Run commands in the checkout with this environment's programs, and write their output to log files."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, log: str, words: Words, keep: Callable[[str], bool], **environment: str) -> list[str]:
        """Run a command and print the lines that `keep` accepts. Return all lines.

        Raises: UserError with the end of the log if the command fails.
        """
        lines = []
        with self.running(words, **environment) as process:
            for line in self.lines(log, process):
                lines.append(line)
                if keep(line):
                    self.show(line)
        if process.returncode:
            raise UserError(f"{_as_typed(words)} exited with {process.returncode}: {self.log_tail(log)}")
        return lines

    @contextlib.contextmanager
    def running(self, words: Words, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """Start a command. An error or an interrupt inside the block kills it with all its children."""
        print(f"  $ {_as_typed(words)}", flush=True)
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
            kill_process_tree(process.pid)
            raise
        finally:
            process.wait()

    def lines(self, log: str, process: subprocess.Popen[str]) -> Iterator[str]:
        """Yield the lines that the process and its children print, until all of them have closed their output."""
        assert process.stdout is not None
        with (self.logs / f"{log}.log").open("a", encoding="utf-8") as file, process.stdout:
            for line in process.stdout:
                file.write(line)
                yield line.rstrip()

    def show(self, line: str) -> None:
        print(f"  | {line}", flush=True)

    def log_tail(self, log: str) -> str:
        path = self.logs / f"{log}.log"
        return f"{path} ends with\n" + "\n".join(path.read_text(encoding="utf-8").splitlines()[-15:])


def with_our_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with added variables, and a PATH that finds this interpreter's programs first.

    A command then runs the `python`, `ray` and `torchrun` that are installed beside this interpreter. It connects to
    this machine directly, and not through the proxy that http_proxy names.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, **_no_proxy_for_this_machine(), **environment}


def _no_proxy_for_this_machine() -> dict[str, str]:
    hosts = [host for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",") if host]
    value = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
    return {"no_proxy": value, "NO_PROXY": value}


def _as_typed(words: Words) -> str:
    """Format a command as a user in the checkout would type it."""
    shown = ["python" if word == sys.executable else str(word) for word in words]
    return " ".join(word.replace(f"{REPOSITORY}{os.sep}", "") for word in shown)


def kill_process_tree(pid: int) -> int:
    """SIGKILL a process and all its descendants, whatever their process groups. Return the number of processes."""
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


def free_ports(count: int) -> list[int]:
    """Return distinct free ports, none of them ephemeral.

    An outgoing connection may be given an ephemeral port before the server opens it.
    """
    candidates = random.sample(range(10_000, 20_000), 10_000)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
