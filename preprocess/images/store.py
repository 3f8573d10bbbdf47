"""Image storage: reads images from folders, or directly from the zip and tar archives in which datasets are published.

The root of the raw data may be a local folder or a URL. If the folder `coco/train2017` exists, the image
`coco/train2017/1.jpg` is read from it. Otherwise the image is the member `1.jpg` or `train2017/1.jpg` of an archive,
which is the archive that the mix names for the folder, or else `coco/train2017.zip` or `coco/train2017.tar`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from preprocess.images.archive import Archive, open_archive
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath, RemotePath, file_size, find_file, spellings, with_slashes

MAX_FILE_BYTES = 100_000_000
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")  # refused with advice
ARCHIVE_SUFFIXES = (".zip", ".tar", *COMPRESSED_SUFFIXES)

_INVALID_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class ImageStore:
    """Image files by their path below the root. Archives stay open, and each process opens them itself.

    Args:
        root: Folder or URL of the raw data.
        archives: Archive of each image folder that is not unpacked. Both paths are relative to the root.
    """

    def __init__(self, root: AnyPath, archives: Mapping[str, str]) -> None:
        self.root = root
        self.archives = {with_slashes(folder): archive for folder, archive in archives.items()}
        self._archive_of_folder: dict[str, Archive | None] = {}

    def read(self, path: str) -> bytes:
        """Return the content of an image file.

        Raises:
            Rejected: If the file is missing, too large or not readable by this user.
            OSError: If the disk or network fails.
        """
        if archive := self._archive_for(_folder(path)):
            member = archive.find(path)
            if member is None:
                raise Rejected("picture_missing", f"no such member of {archive.path.name}")
            _check_file_size(archive.size(member))
            return archive.read(member)
        for spelling in spellings(path):
            try:
                return self._read_file(spelling)
            except OSError as error:  # noqa: PERF203
                if error.errno in _MISSING:
                    continue
                raise _as_reject(error) from None
            except (ValueError, UnicodeError):
                raise Rejected("picture_path_invalid") from None
        raise Rejected("picture_missing")

    def fingerprint(self, path: str) -> str:
        """Return the sha256 of the image file, or the reject reason if the file cannot be read.

        The fingerprint changes if a missing image is added, or if the content of the file changes.
        """
        try:
            return sha256_hex(self.read(path))
        except Rejected as error:
            return error.reason

    def size(self, path: str) -> int | None:
        """Return the size of an image file or archive member in bytes, or None if it is missing."""
        if archive := self._archive_for(_folder(path)):
            member = archive.find(path)
            return None if member is None else archive.size(member)
        for spelling in spellings(path):
            with contextlib.suppress(OSError, ValueError):
                return file_size(self.root / spelling)
        return None

    def has_folder(self, folder: str) -> bool:
        return self._archive_for(with_slashes(folder)) is not None or self._is_folder(folder)

    def _archive_for(self, folder: str) -> Archive | None:
        """Return the archive that replaces the folder or one of its parents, or None if the folder exists."""
        if folder not in self._archive_of_folder:
            self._archive_of_folder[folder] = self._find_archive(folder)
        return self._archive_of_folder[folder]

    def _find_archive(self, folder: str) -> Archive | None:
        if self._is_folder(folder):
            return None
        for ancestor in [folder, *map(str, PurePosixPath(folder).parents)]:
            for spelling in spellings(ancestor):
                for name in (self.archives.get(spelling), *(f"{spelling}{suffix}" for suffix in ARCHIVE_SUFFIXES)):
                    if name and _exists((file := find_file(self.root, name)).is_file):
                        return open_archive(file, ancestor)
        return None

    def _is_folder(self, folder: str) -> bool:
        return any(_exists((self.root / spelling).is_dir) for spelling in spellings(folder))

    def _read_file(self, path: str) -> bytes:
        file = self.root / path
        if isinstance(file, RemotePath):
            data = file.read_bytes(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                _check_file_size(max(file.size(), len(data)))
            return data
        if file.is_symlink() and not _real_path(file).is_relative_to(_real_path(self.root)):
            raise Rejected("picture_path_escapes", f"a link to {file.readlink()}")
        with file.open("rb") as opened:
            _check_file_size(os.fstat(opened.fileno()).st_size)
            return opened.read()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "."


def _real_path(path: AnyPath) -> Path:
    """Resolve links. In some Python versions, `Path.resolve` would raise an error for a link to itself."""
    return Path(os.path.realpath(str(path)))


def _check_file_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise Rejected("picture_too_large", f"{size} bytes, at most {MAX_FILE_BYTES} are read")


def _exists(check: Callable[[], bool]) -> bool:
    """Call `Path.is_file` or `Path.is_dir`, and return False for an invalid file name instead of raising."""
    try:
        return check()
    except OSError as error:
        if error.errno in _INVALID_NAME:
            return False
        raise


def _as_reject(error: OSError) -> Exception:
    """Return a rejection if the data caused the error, or the error itself if the disk or network caused it."""
    if error.errno in _INVALID_NAME:
        return Rejected("picture_path_invalid", error.strerror or "")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Rejected("picture_unreadable", error.strerror or "")
    return error
