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
from pipeline.engine import REPOSITORY

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


def free_ports(count: int) -> list[int]:
    """Return different free ports below the ephemeral range, which any connection may take before a server does."""
    candidates = random.sample(range(10_000, 20_000), 10_000)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
