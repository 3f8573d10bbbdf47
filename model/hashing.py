"""Hashing of files, and of the weights in an exported folder."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from model.errors import UserError

BLOCK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content as hex digits, without loading the file into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(folder: str | Path) -> str:
    """Return a sha256 that identifies the weights of an exported folder, for keys of caches and journals.

    If the folder has one weight file, this is the file's sha256, as `sha256sum` prints it. If it has several, this is
    the sha256 of their lines in the format of `sha256sum`, sorted by name. A file is read again if its size or time has
    changed. No hash is recorded in the folder, because it would be wrong after another program replaced the weights.

    Raises: UserError if the folder has no weight files.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise UserError(
            f"{folder}: no weight files (*.safetensors). Give a folder that python -m pipeline.export wrote."
        )
    hashes = [_cached_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    lines = (f"{sha256}  {path.name}\n" for sha256, path in zip(hashes, paths, strict=True))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.lru_cache
def _cached_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)
