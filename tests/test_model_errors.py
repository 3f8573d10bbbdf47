"""`run_cli` and the mapping of errors to one-line messages and exit codes, including closed pipes."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from model.errors import CommandError, ExitCode, UserError, did_you_mean, oserror_remedy
from pipeline.errors import RetryableError, from_oserror, retryable_oserrors
from tests.support.launch import REPOSITORY, run_python

PROGRAM = "from model.errors import *; from pipeline.errors import *; run_cli(lambda: {body})"
THROW = "(_ for _ in ()).throw({error})"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("UserError('x: wrong')", ExitCode.USER_ERROR, "error: x: wrong"),
        ("RetryableError('x: later')", ExitCode.RETRY, "error: x: later"),
        ("CommandError('x: failed')", ExitCode.FAILED, "error: x: failed"),
        ("PermissionError(13, 'Permission denied', 'f')", ExitCode.USER_ERROR, "error: f: Permission denied; ask"),
        ("FileNotFoundError(2, 'No such file', 'f')", ExitCode.USER_ERROR, "error: f: No such file; check the path"),
        ("OSError(5, 'Input/output error', 'f')", ExitCode.RETRY, "error: f: Input/output error; try again"),
        ("BrokenPipeError(32, 'Broken pipe')", ExitCode.RETRY, "error: Broken pipe; try again"),
    ],
)
def test_run_cli_prints_a_known_error_as_one_line_and_exits_with_its_code(error, code, message):
    done = run_python("-c", PROGRAM.format(body=THROW.format(error=error)))
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith(message)


def test_run_cli_prints_the_traceback_of_an_unexpected_error():
    done = run_python("-c", PROGRAM.format(body="1 / 0"))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("body", ["None", "print('x' * 100_000)"])
def test_a_command_that_prints_to_a_closed_pipe_exits_with_the_broken_pipe_code(body):
    """`command | true` must not exit with code 0 unless the command printed nothing, because its output is lost."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == (ExitCode.OK if body == "None" else ExitCode.BROKEN_PIPE)
    assert done.stderr == ""


def test_from_oserror_returns_user_errors_and_retryable_errors_by_errno():
    assert isinstance(from_oserror(OSError(errno.ENOSPC, "No space left", "f")), UserError)
    for transient in (errno.EIO, errno.ESTALE, errno.EEXIST):
        assert isinstance(from_oserror(OSError(transient, "?", "f")), RetryableError)
    assert oserror_remedy(ValueError()) is None
    assert issubclass(RetryableError, CommandError)


def test_errors_that_no_retry_can_fix_are_user_errors():
    for permanent in (errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.EROFS):
        with pytest.raises(UserError), retryable_oserrors("checkpoints"):
            raise OSError(permanent, "?", "f")
    with pytest.raises(RetryableError), retryable_oserrors("checkpoints"):
        raise OSError(errno.EIO, "?", "f")
    with pytest.raises(FileNotFoundError), retryable_oserrors("checkpoints"):
        raise FileNotFoundError(errno.ENOENT, "?", "f")


def test_did_you_mean_suggests_a_similar_name_and_nothing_for_a_dissimilar_one():
    assert did_you_mean("optm", ["optim", "data"]) == ", did you mean 'optim'"
    assert did_you_mean("zzz", ["optim", "data"]) == ""


PRINT = """
import os, sys
from model.errors import run_cli
run_cli(lambda: print("é … \\u2028", os.fsdecode(b"caf\\xe9"), "\\ud800", flush=True))
"""


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"\xe9 \u2026 \u2028 caf" + b"\xe9" + rb" \ud800"),
        ("latin-1", b"\xe9 " + rb"\u2026 \u2028 caf" + b"\xe9" + rb" \ud800"),
        ("utf-8", "é … \u2028 caf".encode() + b"\xe9" + rb" \ud800"),
    ],
)
def test_run_cli_prints_characters_that_the_encoding_of_the_output_lacks(encoding, expected):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINT], cwd=REPOSITORY, env=environment, capture_output=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", expected + b"\n")


def test_a_file_name_that_the_locale_cannot_represent_is_a_user_error():
    done = run_python(
        "-c", PROGRAM.format(body="open('caf\\xe9\\u2026')"), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert done.returncode == ExitCode.USER_ERROR
    assert done.stderr.startswith(
        "error: 'caf\\xe9\\u2026': the locale's encoding ascii cannot represent this name; set "
    )
    assert done.stderr.count("\n") == 1


def test_a_hub_cache_that_cannot_be_written_is_one_line_that_names_hf_home():
    load = "from preprocess.prompts import load_tokenizer; from model.errors import run_cli; "
    done = run_python("-c", load + "run_cli(lambda: load_tokenizer('a/b'))", HOME="/dev/null", HF_HUB_OFFLINE="0")
    assert done.returncode == ExitCode.USER_ERROR
    assert done.stderr.startswith("error: tokenizer 'a/b' is neither a folder")
    assert "set HF_HOME to a folder that can be written" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("home", ["/dev/null", "/proc/no/home"])
def test_caches_are_in_the_temporary_folder_if_the_home_folder_cannot_be_written(tmp_path, home):
    body = "print(os.environ['MPLCONFIGDIR'], os.environ['TRITON_CACHE_DIR'])"
    done = run_python("-c", PROGRAM.format(body=body), HOME=home, TMPDIR=str(tmp_path), MPLCONFIGDIR="mine")
    assert done.stdout.split() == ["mine", f"{tmp_path}/emma-{os.getuid()}/triton"], done.stderr


def test_a_shard_set_in_a_folder_whose_name_is_not_utf_8_can_be_described(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / os.fsdecode(b"caf\xe9"))
    command = [sys.executable, "-m", "preprocess.shardset", "info", folder]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"35 samples" in done.stdout
