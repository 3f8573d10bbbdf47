"""Errors that end a command with one line and an exit code, and advice on operating-system errors."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import io
import os
import select
import sys
import tempfile
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn


class ExitCode(IntEnum):
    """Exit codes of every command. Python itself exits with 1 after a traceback."""

    OK = 0
    DAMAGED = 1  # the data that was checked is damaged
    USER_ERROR = 2  # an error that the user can fix
    FAILED = 3  # too many rejects, or a failed training run; running the same command again would fail again
    RETRY = 4  # transient failure; running the same command again may succeed
    INTERRUPTED = 130  # interrupted by Ctrl-C
    BROKEN_PIPE = 141  # the reader of stdout, such as `head`, has closed it
    TERMINATED = 143  # terminated by SIGTERM


class CommandError(Exception):
    """Base class of errors that a command reports as one line, without a traceback."""

    exit_code = ExitCode.FAILED


class UserError(CommandError, ValueError):
    """An error that the user can fix. The message says where, what was found, what was expected and what to do."""

    exit_code = ExitCode.USER_ERROR


OSERROR_REMEDIES = {  # errors that retrying does not fix
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EACCES: "ask its owner for permission, or choose another path",
    errno.EPERM: "ask its owner for permission, or choose another path",
    errno.EROFS: "choose a writable path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EOPNOTSUPP: "choose a path on another file system",
    errno.ELOOP: "check the path",
    errno.ENAMETOOLONG: "check the path",
}


def oserror_remedy(error: BaseException) -> str | None:
    """Return advice on an operating-system error that the user can fix, or None if only a retry can help."""
    return OSERROR_REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None


def oserror_text(error: OSError, path: Path | str = "") -> str:
    """Describe an operating-system error as `path: reason`. `path` is used if the error does not name a file."""
    return ": ".join(str(part) for part in (error.filename or path, error.strerror or error) if part)


def read_error(error: OSError, path: Path | str) -> UserError:
    """Describe a file that exists but cannot be read."""
    if isinstance(error, PermissionError):
        return UserError(f"{path}: may not be read ({error.strerror}). Ask its owner for permission to read it.")
    return UserError(f"{oserror_text(error, path)}. {(oserror_remedy(error) or 'try again').capitalize()}.")


def first_line(error: BaseException) -> str:
    """Return the first line of another package's error message, so that it can be part of a one-line message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def hub_error_text(error: BaseException) -> str:
    """Return the first line of an error of the Hugging Face hub's client, with advice if it cannot write its cache."""
    is_local = isinstance(error, OSError) and error.filename and (oserror_remedy(error) or error.errno == errno.ENOENT)
    return first_line(error) + "; set HF_HOME to a folder that can be written" * bool(is_local)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'` for the known name that is most similar to `name`, or "" if no name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {matches[0]!r}" if matches else ""


def name_encoding_error(error: UnicodeEncodeError) -> UserError | None:
    """Return the error to report if the locale cannot represent the name of a file, otherwise None."""
    encoding = sys.getfilesystemencoding()
    if error.encoding != encoding or encoding == "utf-8":
        return None
    return UserError(
        f"{error.object!a}: the locale's encoding {encoding} cannot represent this name; set PYTHONUTF8=1, or a UTF-8 "
        "locale such as LC_ALL=C.UTF-8"
    )


def accept_any_character() -> None:
    """Make stdout and stderr write every character, as an escape such as \\xe9 if their encoding lacks it.

    Bytes of a file name that Python could not decode are written unchanged, so that scripts can read the name.
    """
    codecs.register_error("any_character", _encode_one_character)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not the replacement that a test or a notebook has set
            stream.reconfigure(errors="any_character")


def _encode_one_character(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    first = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    try:
        return codecs.lookup_error("surrogateescape")(first)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(first)


# Variables that select the folders of other packages' caches, which are usually below the home folder.
CACHES = {"MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "torch_extensions"}


def use_writable_caches() -> None:
    """If the home folder cannot be written, put the caches of matplotlib, Triton and torch into the temporary folder.

    A variable that is already set is kept.
    """
    if _home_is_writable():
        return
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"emma-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():  # otherwise another user has created the folder
            for variable, name in CACHES.items():
                os.environ.setdefault(variable, str(folder / name))


def _home_is_writable() -> bool:
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        return False
    return home.is_dir() and os.access(home, os.W_OK | os.X_OK)


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit. Print a `CommandError` or an operating-system error as one line, without a traceback."""
    accept_any_character()
    use_writable_caches()
    try:
        code = main() or ExitCode.OK
        sys.stdout.flush()
    except CommandError as error:
        code = _report(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            sys.exit(ExitCode.BROKEN_PIPE)
        if error.errno is None:
            raise
        remedy = oserror_remedy(error) or ("check the path" if error.errno == errno.ENOENT else None)
        code = _report(
            f"{oserror_text(error)}; {remedy or 'try again'}", ExitCode.USER_ERROR if remedy else ExitCode.RETRY
        )
    except UnicodeEncodeError as error:
        if (known := name_encoding_error(error)) is None:
            raise
        code = _report(str(known), known.exit_code)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = ExitCode.INTERRUPTED
    sys.exit(code)


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout has closed it. If so, redirect stdout, so that flushing at exit succeeds."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are reported even for an empty event mask
        closed = any(events & select.POLLERR for _, events in poll.poll(0))
    except OSError:  # stdout is not a file
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _report(message: str, code: ExitCode) -> ExitCode:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
