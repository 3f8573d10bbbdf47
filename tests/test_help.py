"""`--help` of every command and benchmark: it prints a usage line and needs no other argument."""

import pytest

from tests.support.launch import REPOSITORY, fork_python

FOLDERS = ("preprocess", "pipeline", "benchmarks")
COMMANDS = sorted(
    path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
    for folder in FOLDERS
    for path in (REPOSITORY / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def test_the_commands_are_found():
    assert {"pipeline.train", "preprocess.build_shards", "benchmarks.resume"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_prints_its_usage_even_if_the_output_is_ascii(command):
    done = fork_python("-m", command.removesuffix(".__main__"), "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
