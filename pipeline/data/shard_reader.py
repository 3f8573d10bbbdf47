"""Samples by their place in the index: random access into the tars, and nothing is skipped.

A sample that cannot be read is an error that says what to do. Shards that change while a run reads them are noticed: by
size, time and inode at every read, and held to the manifest's hash if those differ.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import UserError
from model.hashing import file_sha256
from pipeline.distributed.stall_warning import StallWarning
from pipeline.errors import RetryableError
from preprocess.rejects import Rejected
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.sample import Sample, from_payloads, sample_pixels

Pixels = npt.NDArray[np.uint8]
Stamp = tuple[int, int, int, bool]
PARTS = ("tokens", "meta", "image")  # of a sample, as the index names them
FOR_PEOPLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedShardError(UserError):
    """One rank met it, the others did not."""


class ShardReader:
    """Opens each tar once per process; safe to send to another process.

    `slow`: (shard, key, seconds) of reads that took long, for the caller to take away.
    """

    def __init__(self, folder: str | Path):
        self.folder = ShardFolder(Path(folder))
        self.manifest = Manifest.load(self.folder)
        self.stamps = [_stamp_of(self.folder.file(shard.name)) for shard in self.manifest.shards]
        self._begin()

    def _begin(self) -> None:
        self.files: dict[int, int] = {}
        self.stall_warning = StallWarning()
        self.slow: list[tuple[str, str, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "stamps": self.stamps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __del__(self) -> None:
        for file in self.__dict__.get("files", {}).values():
            os.close(file)

    @functools.cached_property
    def index(self) -> Any:
        try:
            return load_index(self.folder)
        except OSError as error:
            raise RetryableError(f"{self.folder}: {socket.gethostname()} cannot read its index ({error})") from error

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        names = ["shard", *(f"{part}_{what}" for part in PARTS for what in ("offset", "bytes"))]
        return {name: self.index.column(name).to_numpy() for name in names}

    def read(self, row: int) -> tuple[Sample, Pixels | None]:
        """A sample and its picture [h, w, 3].

        Raises: DamagedShardError naming shard, key and the remedy; RetryableError if the file system fails.
        """
        try:
            tokens, meta, image = self._payloads(row)
            sample = from_payloads(self._key(row), tokens, meta, image or None)
            return sample, sample_pixels(sample, self.manifest.image["px"]) if image else None
        except (OSError, EOFError, ValueError, KeyError, TypeError, Rejected) as error:
            place = f"{self._path(self.columns['shard'][row])}: sample {self._key(row)} cannot be read"
            if isinstance(error, OSError) and error.errno not in (None, *FOR_PEOPLE):
                raise RetryableError(f"{place}: the file system of {socket.gethostname()} fails ({error})") from error
            raise DamagedShardError(
                f"{place} ({error}); find the damage with `python -m preprocess.shardset verify {self.folder}`, "
                "delete what it names and build the shards again"
            ) from error

    def _payloads(self, row: int) -> list[bytes]:
        number = int(self.columns["shard"][row])
        path, key = self._path(number), self._key(row)
        with self.stall_warning.warn_if_slow(lambda: f"{path}: reading sample {key}") as slow:
            file = self._file(number)
            places = [(self.columns[f"{part}_offset"][row], self.columns[f"{part}_bytes"][row]) for part in PARTS]
            payloads = [_payload(file, int(offset), int(size)) for offset, size in places]
        self.slow += [(str(path), key, seconds) for seconds in slow]
        return payloads

    def _path(self, number: int) -> Path:
        return self.folder.file(self.manifest.shards[number].name)

    def _key(self, row: int) -> str:
        return str(self.index.column("key")[row])

    def _file(self, number: int) -> int:
        """The open shard; opened again, and held to its hash, if it is not the file that it was when the run began."""
        file = self.files.get(number)
        if file is not None:
            if _is_still(file, self.stamps[number]):
                return file
            os.close(self.files.pop(number))
        path = self._path(number)
        file = self.files[number] = os.open(path, os.O_RDONLY)
        stamp = _stamp(os.fstat(file))
        if stamp != self.stamps[number]:
            if file_sha256(path) != self.manifest.shards[number].sha256:
                raise ValueError("the shard was replaced after the run began, and is not what the manifest says")
            self.stamps[number] = stamp
        return file


def _payload(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise EOFError(f"it has {len(data)} of {size} bytes at {offset}")
    return data


def _stamp(about: os.stat_result) -> Stamp:
    """What changes when a file is written to, or another one takes its name."""
    return about.st_size, about.st_mtime_ns, about.st_ino, about.st_nlink > 0


def _is_still(file: int, stamp: Stamp | None) -> bool:
    try:
        return _stamp(os.fstat(file)) == stamp
    except OSError:
        return False  # a network file system may forget a file that was replaced


def _stamp_of(path: Path) -> Stamp | None:
    try:
        return _stamp(path.stat())
    except OSError:
        return None  # the preflight has told, or it will be read in vain
