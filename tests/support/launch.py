"""Functions that start test programs, in new processes or in forks of the fork server."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.fork_server import REPOSITORY, ForkedProgram

Program = subprocess.Popen[str] | ForkedProgram


def run_python(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the checkout in a new process, with additional environment variables."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def fork_python(
    *arguments: str | Path, cwd: Path = REPOSITORY, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a fork of the fork server, which saves import time. Programs run on the CPU only."""
    words = [str(word) for word in arguments]
    program = ForkedProgram(words, environment, cwd=cwd, ranks=0, merge_errors=False)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(words, program.wait(), stdout, stderr)


def torchrun(ranks: int, program: list[str | Path]) -> subprocess.Popen[str]:
    """Start a program on this number of ranks with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", *map(str, program)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fork_ranks(ranks: int, program: list[str | Path], *, cwd: Path = REPOSITORY) -> ForkedProgram:
    """Start a program on this number of ranks, each a fork of the fork server with torchrun's environment variables."""
    return ForkedProgram([str(word) for word in program], {}, cwd=cwd, ranks=ranks, merge_errors=True)


def kill_all(process: Program) -> None:
    """Kill a launcher and all its descendants. Killing one process group would miss some of them."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()


def finish(process: Program, code: int | None = 0, timeout: float = 180) -> str:
    """Wait for a program and return its output. Fail if its exit code differs from `code`, unless `code` is None."""
    output, _ = process.communicate(timeout=timeout)
    assert code is None or process.returncode == code, output
    return output
