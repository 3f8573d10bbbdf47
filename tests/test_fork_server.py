"""The fork server of the tests: forked programs behave as new Python processes do."""

import signal
import subprocess

import pytest

from tests.support.launch import REPOSITORY, finish, fork_python, fork_ranks, kill_all

COLLECTIVE = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
values = [None] * 2
dist.all_gather_object(values, os.environ["LOCAL_RANK"])
print(f"{values}\\n", end="", flush=True)  # one write, since the ranks share the pipe
"""


@pytest.mark.parametrize(
    ("code", "returncode", "stdout", "last_error"),
    [
        ("import sys; print(sys.argv)", 0, "['-c', 'word']\n", None),
        ("import sys; sys.exit(3)", 3, "", None),
        ("import sys; sys.exit('error: wrong')", 1, "", "error: wrong"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -9, "", None),
        ("import atexit; atexit.register(print, 'end')", 0, "end\n", None),
    ],
)
def test_a_forked_program_has_the_exit_code_and_output_of_a_new_process(code, returncode, stdout, last_error):
    done = fork_python("-c", code, "word")
    assert (done.returncode, done.stdout) == (returncode, stdout)
    assert done.stderr.splitlines()[-1:] == ([last_error] if last_error else [])


def test_a_forked_program_gets_the_callers_environment_and_working_directory(monkeypatch):
    monkeypatch.setenv("SET_BY_TEST", "1")
    code = "import os; from pathlib import Path; print(os.environ['SET_BY_TEST'], os.environ['MORE'], Path.cwd())"
    assert fork_python("-c", code, MORE="2").stdout == f"1 2 {REPOSITORY}\n"


def test_the_fork_server_does_not_preload_modules_of_this_repository():
    code = (
        "import sys; print([name for name in sys.modules if name.split('.')[0] in ('model', 'preprocess', 'pipeline')])"
    )
    assert fork_python("-c", code).stdout == "[]\n"


def test_forked_ranks_communicate_over_gloo():
    assert finish(fork_ranks(2, ["-c", COLLECTIVE])).splitlines() == ["['0', '1']"] * 2


def test_a_failing_forked_rank_ends_the_other_ranks():
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(600)"
    assert "ended with 3" in finish(fork_ranks(2, ["-c", program]), code=1, timeout=60)


def test_killing_the_launcher_of_forked_ranks_kills_the_ranks():
    process = fork_ranks(2, ["-c", "import time; time.sleep(600)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    assert process.poll() is None
    kill_all(process)
    assert process.returncode == -signal.SIGKILL
