"""Where the bytes of a picture come from: folders under the root, or the zips and tars that datasets are published as.

The root may be a URL; archives are then read in place, too.

`coco/train2017/1.jpg` is that file if its folder is there; else it is sought, as `1.jpg` or `train2017/1.jpg`, in the
archive that the mix names for the folder, or that lies beside its place as `coco/train2017.zip` (.tar).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import posixpath
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from model.errors import UserError
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath, RemotePath, file_size

MAX_FILE_BYTES = 100_000_000
MAX_LINKS = 8

_NOT_A_FILE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class ImageStore:
    """Reads pictures by their path under the root. Archives stay open, one handle per process."""

    def __init__(self, root: AnyPath, archives: Mapping[str, str]) -> None:
        self.root, self.archives = root, dict(archives)
        self._archive_of: dict[str, _Archive | None] = {}

    def read(self, path: str) -> bytes:
        """Raises: Rejected if the picture is not there, too large or may not be read; OSError if reading failed."""
        if archive := self._archive_for(path.rpartition("/")[0] or "."):
            return archive.read(path)
        for spelling in _spellings(path):
            try:
                return self._read_file(spelling)
            except OSError as error:  # noqa: PERF203
                if error.errno in _ABSENT:
                    continue
                raise _as_reject(error) from None
            except (ValueError, UnicodeError):
                raise Rejected("picture_path_invalid") from None
        raise Rejected("picture_missing")

    def fingerprint(self, path: str) -> str:
        """The digest of the picture, or why it cannot be read: changes when it comes or is mended, at whatever size."""
        try:
            return sha256_hex(self.read(path))
        except Rejected as error:
            return error.reason

    def size(self, path: str) -> int | None:
        """Of the picture alone, also where it is the member of an archive; None if it is not there."""
        if archive := self._archive_for(path.rpartition("/")[0] or "."):
            return archive.size(path)
        for spelling in _spellings(path):
            with contextlib.suppress(OSError, ValueError):
                return file_size(self.root / spelling)
        return None

    def has_folder(self, folder: str) -> bool:
        return self._is_folder(folder) or self._archive_for(folder) is not None

    def _archive_for(self, folder: str) -> _Archive | None:
        """The archive that stands for the folder or for one above it, unless the folder is there."""
        if folder not in self._archive_of:
            self._archive_of[folder] = self._find_archive(folder)
        return self._archive_of[folder]

    def _find_archive(self, folder: str) -> _Archive | None:
        if self._is_folder(folder):
            return None
        for ancestor in [folder, *map(str, PurePosixPath(folder).parents)]:
            for spelling in _spellings(ancestor):
                for name in (self.archives.get(spelling), f"{spelling}.zip", f"{spelling}.tar"):
                    if name and _exists((self.root / name).is_file):
                        return _open_archive(self.root / name, ancestor)
        return None

    def _is_folder(self, folder: str) -> bool:
        return any(_exists((self.root / spelling).is_dir) for spelling in _spellings(folder))

    def _read_file(self, path: str) -> bytes:
        file = self.root / path
        if isinstance(file, RemotePath):
            data = file.read_bytes(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                _guard_size(max(file.size(), len(data)))
            return data
        if file.is_symlink() and not _real(file).is_relative_to(_real(self.root)):
            raise Rejected("picture_path_escapes", f"a link to {file.readlink()}")
        with file.open("rb") as opened:
            _guard_size(os.fstat(opened.fileno()).st_size)
            return opened.read()


def _real(path: AnyPath) -> Path:
    """Where links lead. `Path.resolve` differs: it raises for a link to itself, depending on the version of Python."""
    return Path(os.path.realpath(str(path)))


def _guard_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise Rejected("picture_too_large", f"{size} bytes, at most {MAX_FILE_BYTES} are read")


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _exists(of_kind: Callable[[], bool]) -> bool:
    """A name that no file can have names none."""
    try:
        return of_kind()
    except OSError as error:
        if error.errno in _NOT_A_FILE_NAME:
            return False
        raise


def _spellings(path: str) -> list[str]:
    """The path as written, then as other systems spell its accents."""
    return list(dict.fromkeys([path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]))


def _as_reject(error: OSError) -> Exception:
    if error.errno in _NOT_A_FILE_NAME:
        return Rejected("picture_path_invalid", error.strerror or "")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Rejected("picture_unreadable", error.strerror or "")
    return error


class _Archive:
    """Pictures by their path under the root, of an archive that stands for `folder`."""

    def __init__(self, path: AnyPath, folder: str) -> None:
        self.path, self.folder = path, PurePosixPath(folder)
        file = path.open("rb")
        try:
            self._packed: _Zip | _Tar = _Zip(file) if zipfile.is_zipfile(file) else _Tar(file)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            file.close()
            raise UserError(f"picture archive {path} is damaged ({error}); fetch it again") from None

    def read(self, path: str) -> bytes:
        name = self._name(path)
        if name is None:
            raise Rejected("picture_missing", f"no such member of {self.path.name}")
        _guard_size(self._packed.size(name))
        return self._member(name)

    def size(self, path: str) -> int | None:
        name = self._name(path)
        return self._packed.size(name) if name else None

    def _name(self, path: str) -> str | None:
        inside = PurePosixPath(path).relative_to(self.folder)
        places = (str(inside), str(self.folder.name / inside), f"./{inside}")
        names = (spelling for place in places for spelling in _spellings(place))
        return next((name for name in names if name in self._packed.names), None)

    def _member(self, name: str) -> bytes:
        try:
            return self._packed.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise Rejected("picture_corrupt", f"in {self.path.name}: {error}") from None


class _Zip:
    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        self.names = {_zip_name(member): member for member in self._zip.infolist()}

    def read(self, name: str) -> bytes:
        return self._zip.read(self.names[name])

    def size(self, name: str) -> int:
        return self.names[name].file_size


def _zip_name(member: zipfile.ZipInfo) -> str:
    """As UTF-8 where it can be read so: Macs write it without the flag that says so, and zipfile takes it for DOS's."""
    if member.flag_bits & 0x800 or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


class _Tar:
    """Names are kept as paths from the archive's top; links within it lead to what they name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0)
        self.names: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isfile():
                    self.names[name] = member.size, member.offset_data
                    links.pop(name, None)  # of members of one name the last one counts
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        self.names |= {link: self.names[name] for link, name in _followed(links).items() if name in self.names}

    def read(self, name: str) -> bytes:
        size, offset = self.names[name]
        self._file.seek(offset)
        return self._file.read(size)

    def size(self, name: str) -> int:
        return self.names[name][0]


def _followed(links: Mapping[str, str]) -> dict[str, str]:
    """Each link's last name; one that goes in a circle ends somewhere on it."""
    ends = dict(links)
    for _ in range(MAX_LINKS):
        ends = {link: links.get(name, name) for link, name in ends.items()}
    return ends


@functools.lru_cache(maxsize=64)
def _open_archive(path: AnyPath, folder: str) -> _Archive:
    return _Archive(path, folder)
