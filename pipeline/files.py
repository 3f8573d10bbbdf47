"""Files of a training, beside what shards do already: JSON that is whole or absent, and large files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from preprocess.shards import publish


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    publish(path, json.dumps(content, indent=indent, default=str).encode() + b"\n")


def sync(file: IO[bytes]) -> None:
    """Bring to disk what was written so far, and do not keep it in the page cache, which has better uses."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
