"""What slurm/install_kernels.sh says before it builds; building takes a CUDA compiler and minutes."""

import subprocess

import pytest

from tests.support.slurm import REPOSITORY


def install_kernels(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["slurm/install_kernels.sh", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--sm", "80"], ["--arch"]])
def test_a_mistake_on_the_command_line_is_one_line(words):
    told = install_kernels(*words)
    assert told.returncode != 0
    assert told.stdout == ""
    assert words[0] in told.stderr
    assert told.stderr.count("\n") == 1
