"""Shard reader: random access to samples by their offsets in the index.

A sample that cannot be read raises an error; nothing is skipped. The reader also notices shards that change while a run
uses them: at every read, it compares the shard's size, modification time and inode with those at the beginning. If they
differ, it compares the shard's sha256 with the manifest.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.errors import UserError, oserror_remedy
from model.hashing import file_sha256
from pipeline.distributed.stall_warning import StallWarning
from pipeline.errors import RetryableError, retryable_oserrors
from preprocess.rejects import Rejected
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.sample import Sample, from_payloads, sample_pixels

Pixels = npt.NDArray[np.uint8]
Fingerprint = tuple[int, int, int, bool]  # size, modification time, inode, whether the file has not been deleted
PARTS = ("tokens", "meta", "image")  # members of a sample; the index has `<part>_offset` and `<part>_bytes` of each


class DamagedShardError(UserError):
    """Raised if a sample cannot be read. Unlike other user errors, it can occur on one rank alone."""


class SlowRead(NamedTuple):
    """A read that took longer than the limit of `StallWarning`."""

    shard: str
    key: str
    seconds: float


class ShardReader:
    """Read samples by their row in the index.

    Each process opens each shard once. A DataLoader worker receives a pickled reader, which opens its own files.
    """

    def __init__(self, folder: str | Path):
        self.folder = ShardFolder(Path(folder))
        self.manifest = Manifest.load(self.folder)
        self.fingerprints = [_path_fingerprint(self.folder.file(shard.name)) for shard in self.manifest.shards]
        self._reset()

    def _reset(self) -> None:
        self.files: dict[int, int] = {}
        self.stall_warning = StallWarning()
        self.slow_reads: list[SlowRead] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "fingerprints": self.fingerprints}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._reset()

    def __del__(self) -> None:
        for file in self.__dict__.get("files", {}).values():
            os.close(file)

    @functools.cached_property
    def index(self) -> Any:
        with retryable_oserrors(self.folder.index):
            return load_index(self.folder)

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        names = ["shard", *(f"{part}_{field}" for part in PARTS for field in ("offset", "bytes"))]
        return {name: self.index.column(name).to_numpy() for name in names}

    def pop_slow_reads(self) -> tuple[SlowRead, ...]:
        """Return the slow reads since the last call."""
        slow_reads, self.slow_reads = tuple(self.slow_reads), []
        return slow_reads

    def read(self, row: int) -> tuple[Sample, Pixels | None]:
        """Read a sample, and decode its image to [h, w, 3].

        Raises:
            DamagedShardError: The sample is damaged or missing. The message names the shard, the key and the remedy.
            RetryableError: The file system failed.
        """
        try:
            tokens, meta, image = self._read_parts(row)
            sample = from_payloads(self._key(row), tokens=tokens, meta=meta, image=image or None)
            return sample, sample_pixels(sample, self.manifest.image["px"]) if image else None
        except (OSError, EOFError, ValueError, KeyError, TypeError, Rejected) as error:
            message = f"{self._path(self.columns['shard'][row])}: sample {self._key(row)} cannot be read"
            if _is_transient(error):
                raise RetryableError(f"{message}: the file system of {socket.gethostname()} fails ({error})") from error
            raise DamagedShardError(
                f"{message} ({error}); find the damage with `python -m preprocess.shardset verify {self.folder}`, "
                "delete the files that it names, and build the shards again"
            ) from error

    def _read_parts(self, row: int) -> list[bytes]:
        shard = int(self.columns["shard"][row])
        path, key = self._path(shard), self._key(row)
        with self.stall_warning.warn_if_slow(lambda: f"{path}: reading sample {key}") as slow:
            file = self._open(shard)
            extents = [
                (int(self.columns[f"{part}_offset"][row]), int(self.columns[f"{part}_bytes"][row])) for part in PARTS
            ]
            parts = [_pread(file, offset, size) for offset, size in extents]
        self.slow_reads += [SlowRead(str(path), key, seconds) for seconds in slow]
        return parts

    def _path(self, shard: int) -> Path:
        return self.folder.file(self.manifest.shards[shard].name)

    def _key(self, row: int) -> str:
        return str(self.index.column("key")[row])

    def _open(self, shard: int) -> int:
        """Return the open file of a shard. If the shard was modified or replaced, reopen and hash its file.

        Raises: ValueError if its content differs from the manifest.
        """
        file = self.files.get(shard)
        if file is not None:
            current = _file_fingerprint(file)
            if current is not None and current == self.fingerprints[shard]:
                return file
            os.close(self.files.pop(shard))
        path = self._path(shard)
        file = self.files[shard] = os.open(path, os.O_RDONLY)
        fingerprint = _fingerprint(os.fstat(file))
        if fingerprint != self.fingerprints[shard]:
            if file_sha256(path) != self.manifest.shards[shard].sha256:
                raise ValueError(
                    "the shard was replaced after the run began, and its content differs from the manifest"
                )
            self.fingerprints[shard] = fingerprint
        return file


def _is_transient(error: Exception) -> bool:
    """Return whether the disk, not the data, is at fault. Decoders raise an OSError without errno for damaged data."""
    if not isinstance(error, OSError) or error.errno in (None, errno.ENOENT):
        return False
    return oserror_remedy(error) is None


def _pread(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise EOFError(f"found {len(data)} bytes at offset {offset}, expected {size}")
    return data


def _fingerprint(stat: os.stat_result) -> Fingerprint:
    """Return values that change when a file is written to or replaced by another."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_nlink > 0


def _file_fingerprint(file: int) -> Fingerprint | None:
    try:
        return _fingerprint(os.fstat(file))
    except OSError:
        return None  # a network file system may no longer know a file that was replaced


def _path_fingerprint(path: Path) -> Fingerprint | None:
    try:
        return _fingerprint(path.stat())
    except OSError:
        return None  # reported by the preflight, or by the first read
