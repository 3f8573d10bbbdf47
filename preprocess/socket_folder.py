"""Choice of a folder for Unix sockets, because the path of a socket has at most 107 bytes."""

from __future__ import annotations

import os
import tempfile

from model.errors import UserError

MAX_PATH_BYTES = 107
ALTERNATIVES = ("/tmp", "/var/tmp", "/dev/shm")


def socket_folder(preferred: str, name: str) -> str:
    """Return `preferred`, or another folder if a socket cannot be created in `preferred`.

    Args:
        name: longest path of a socket, relative to the folder

    Raises: UserError if no folder can hold the socket.
    """
    for folder in (preferred, *ALTERNATIVES):
        if len(os.fsencode(f"{folder}/{name}")) <= MAX_PATH_BYTES and _is_writable(folder):
            return folder
    raise UserError(
        f"no folder for sockets: {preferred} (from TMPDIR) and {', '.join(ALTERNATIVES)} cannot be written, or their "
        f"path is too long (expected at most {MAX_PATH_BYTES - 1 - len(name)} bytes); set TMPDIR to another folder"
    )


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False
