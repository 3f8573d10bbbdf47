"""Options of slurm/install_kernels.sh. The tests build nothing, because a build needs a CUDA compiler and minutes."""

import subprocess

import pytest

from tests.support.slurm import REPOSITORY


def install_kernels(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["slurm/install_kernels.sh", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--sm", "80"], ["--arch"]])
def test_install_kernels_reports_an_invalid_option_in_one_line(words):
    done = install_kernels(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words[0] in done.stderr
    assert done.stderr.count("\n") == 1
