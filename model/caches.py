"""Folders for the caches of other packages, which are usually below the home folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

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
