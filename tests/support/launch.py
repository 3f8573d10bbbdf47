"""Start programs for tests, in new processes or in forks of a process that has imported torch and DeepSpeed."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.fork_server import REPOSITORY, ForkedProgram

Program = subprocess.Popen[str] | ForkedProgram


def run_python(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the checkout, as a user would, with these additional environment variables."""
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
    """Run the same as `run_python`, six seconds of CPU time faster and on the CPU only, in a fork."""
    words = [str(word) for word in arguments]
    program = ForkedProgram(words, environment, cwd=cwd, ranks=0, merge_errors=False)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(words, program.wait(), stdout, stderr)


def torchrun(ranks: int, program: list[str | Path]) -> subprocess.Popen[str]:
    """Start a program on this many gloo ranks with torchrun."""
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
    """Start a program on this many gloo ranks, each a fork with the environment variables of torchrun."""
    return ForkedProgram([str(word) for word in program], {}, cwd=cwd, ranks=ranks, merge_errors=True)


def kill_all(process: Program) -> None:
    """Kill a launcher and all processes that it started, which are in process groups of their own."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()


def finish(process: Program, code: int | None = 0, timeout: float = 180) -> str:
    """Wait for a program and return its output; its exit code must be `code`, unless that is None."""
    output, _ = process.communicate(timeout=timeout)
    assert code is None or process.returncode == code, output
    return output
