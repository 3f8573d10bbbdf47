"""Where raw data lies: a folder, or a URL that fsspec can read, such as s3://bucket/raw."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from model.errors import UserError


@dataclass(frozen=True)
class RemotePath:
    """A place behind a URL, with as much of `Path` as reading needs."""

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
        files, path = self._found()
        return files.isdir(path)

    def is_file(self) -> bool:
        files, path = self._found()
        return files.isfile(path)

    def size(self) -> int:
        files, path = self._found()
        return files.size(path)

    def open(self, mode: str = "rb") -> IO[bytes]:
        files, path = self._found()
        return files.open(path, mode)

    def read_bytes(self, most: int) -> bytes:
        """The first `most` bytes. Raises: OSError, whose errno tells absence from failure; fsspec leaves it out."""
        files, path = self._found()
        try:
            return files.cat_file(path, start=0, end=most)
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except PermissionError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.url) from None
        except Exception:
            if files.size(path) == 0:  # object stores have no range of nothing
                return b""
            raise

    def _found(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps for the next time, and the path in it."""
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.url} cannot be read: {error}") from None


Place = Path | RemotePath


def place(text: str) -> Place:
    return RemotePath(text) if "://" in text else Path(text)


def size_of(file: Place) -> int:
    """Raises: OSError if there is no such file."""
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size
