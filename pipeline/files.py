"""Files of a training, beside what shards do already: JSON that is whole or absent, and other packages' files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from preprocess.shards import publish


def write_json(path: Path, content: Any) -> None:
    publish(path, json.dumps(content, indent=2, default=str).encode() + b"\n")


def sync_file(path: Path) -> None:
    """Bring to disk what another package has written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
