"""Paths of raw data: local paths, and URLs that fsspec can read, such as s3://bucket/raw."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec

from model.errors import UserError

MAX_SPELLINGS = 32


@dataclass(frozen=True)
class RemotePath:
    """A URL with the methods of `pathlib.Path` that are needed to read raw data.

    This class is used instead of universal_pathlib for three reasons: it can read only the beginning of an oversized
    file, its errors have an errno, and it normalises paths (`.` and `//`).
    """

    url: str

    def __truediv__(self, part: str | Path) -> RemotePath:
        inside = Path(part).as_posix()
        return self if inside == "." else RemotePath(f"{self.url.rstrip('/')}/{inside}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def absolute(self) -> RemotePath:
        return self

    def is_absolute(self) -> bool:
        return True

    def is_symlink(self) -> bool:
        return False

    def is_dir(self) -> bool:
        filesystem, path = self._resolve()
        return filesystem.isdir(path)

    def is_file(self) -> bool:
        filesystem, path = self._resolve()
        return filesystem.isfile(path)

    def size(self) -> int:
        filesystem, path = self._resolve()
        return filesystem.size(path)

    def open(self, mode: str = "rb") -> IO[bytes]:
        filesystem, path = self._resolve()
        return filesystem.open(path, mode)

    def read_bytes(self, max_bytes: int) -> bytes:
        """Read the first `max_bytes` bytes.

        Raises: OSError. Unlike fsspec's errors, it has an errno, so that callers can distinguish a missing file from a
            failed read.
        """
        filesystem, path = self._resolve()
        try:
            return filesystem.cat_file(path, start=0, end=max_bytes)
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except PermissionError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.url) from None
        except Exception:
            if filesystem.size(path) == 0:  # object stores refuse a range request for an empty object
                return b""
            raise

    def _resolve(self) -> tuple[Any, str]:
        """Return the fsspec file system and the path inside it. fsspec caches the file system."""
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.url} cannot be read: {error}") from None


AnyPath = Path | RemotePath


def parse_path(text: str) -> AnyPath:
    """Return a `RemotePath` if `text` is a URL, otherwise a `Path`."""
    return RemotePath(text) if "://" in text else Path(text)


def with_slashes(path: str) -> str:
    """Return a relative path with slashes for backslashes, and without `.` and doubled slashes."""
    return str(PurePosixPath(path.replace("\\", "/")))


def spellings(path: str) -> list[str]:
    """Return the path as it is written, and its other spellings: with slashes for backslashes, and with each name that
    has accents in its composed (NFC) and decomposed (NFD) form.
    """
    forms = [_unicode_forms(name) for name in with_slashes(path).split("/")]
    paths = itertools.islice(itertools.product(*forms), MAX_SPELLINGS)
    return list(dict.fromkeys([path, *map("/".join, paths)]))


def _unicode_forms(name: str) -> list[str]:
    return list(dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]))


def find_file(root: AnyPath, path: str) -> AnyPath:
    """Return the first spelling of `root / path` that is a file, or `root / path` itself if there is none."""
    for spelling in spellings(path):
        with contextlib.suppress(OSError, ValueError):  # opening the returned path raises the error again
            if (root / spelling).is_file():
                return root / spelling
    return root / path


def file_size(file: AnyPath) -> int:
    """Return the size of a file in bytes. Raises: OSError if there is no such file."""
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size
