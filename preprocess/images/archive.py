"""Zip and tar archives that hold the images of a folder, read without unpacking them."""

from __future__ import annotations

import functools
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO

from model.errors import UserError
from preprocess.file_kinds import COMPRESSED, HEAD_BYTES, FileKind, recognise
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath, spellings

MAX_LINKS = 8


class Archive:
    """An archive that is used in place of the image folder `folder`.

    `folder` and image paths are relative to the root of the raw data.

    Raises: UserError if the archive is damaged.
    """

    def __init__(self, path: AnyPath, folder: str) -> None:
        self.path, self.folder = path, PurePosixPath(folder)
        file = path.open("rb")
        try:
            self._contents: _Zip | _Tar = _Zip(file) if zipfile.is_zipfile(file) else _Tar(file)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            file.seek(0)
            kind = recognise(file.read(HEAD_BYTES))
            file.close()
            raise _unusable(path, folder, kind, error) from None

    def find(self, path: str) -> str | None:
        """Return the name of the member that holds the image, or None if there is none.

        The archive may hold the folder's content with or without the folder itself.
        """
        inside = PurePosixPath(path).relative_to(self.folder)
        candidates = (str(inside), str(self.folder.name / inside))
        names = (spelling for candidate in candidates for spelling in spellings(candidate))
        return next((name for name in names if name in self._contents.members), None)

    def size(self, member: str) -> int:
        return self._contents.size(member)

    def read(self, member: str) -> bytes:
        """Return the content of a member. Raises: Rejected if it is damaged; OSError if reading failed."""
        try:
            return self._contents.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise Rejected("picture_corrupt", f"in {self.path.name}: {error}") from None


@functools.lru_cache(maxsize=64)
def open_archive(path: AnyPath, folder: str) -> Archive:
    """Open an archive once per process, because listing the members of a large one takes seconds."""
    return Archive(path, folder)


def _unusable(path: AnyPath, folder: str, kind: FileKind | None, error: Exception) -> UserError:
    """Return the error about a file that is neither a zip nor an uncompressed tar, or a damaged one."""
    if kind is None or kind.name in ("a zip file", "a tar file"):
        return UserError(f"image archive {path} is damaged ({error}); download it again")
    remedy = kind.remedy
    if kind.name in COMPRESSED:
        remedy = f"unpack it into the folder {folder}, or decompress it, because images are read from it in place"
    return UserError(f"image archive {path} is {kind.name}, expected a zip or an uncompressed tar: {remedy}")


def _normalised(name: str) -> str:
    """Return the name of a member with slashes, because programs on Windows may write backslashes."""
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")


class _Zip:
    """Members of a zip by normalised name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        names = [(_decoded_name(member), member) for member in self._zip.infolist()]
        self.members = {_normalised(name): member for name, member in names}
        self.members |= {name: member for name, member in names if name in self.members}

    def read(self, name: str) -> bytes:
        return self._zip.read(self.members[name])

    def size(self, name: str) -> int:
        return self.members[name].file_size


def _decoded_name(member: zipfile.ZipInfo) -> str:
    """Return the name of a member, decoded as UTF-8 if possible.

    macOS writes UTF-8 names without setting the UTF-8 flag, so that zipfile decodes them as cp437.
    """
    if member.flag_bits & 0x800 or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


class _Tar:
    """Offset and size of each member of an uncompressed tar, by normalised name. Links have those of their target."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0)
        self.members: dict[str, tuple[int, int]] = {}  # name -> size, offset
        links: dict[str, str] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = _normalised(member.name)
                if member.isfile():
                    self.members[name] = member.size, member.offset_data
                    links.pop(name, None)  # the last member of a name replaces earlier ones
                elif member.islnk():
                    links[name] = _normalised(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(
                        posixpath.join(posixpath.dirname(name), member.linkname.replace("\\", "/"))
                    )
        targets = _resolve_links(links)
        self.members |= {link: self.members[name] for link, name in targets.items() if name in self.members}

    def read(self, name: str) -> bytes:
        size, offset = self.members[name]
        self._file.seek(offset)
        return self._file.read(size)

    def size(self, name: str) -> int:
        return self.members[name][0]


def _resolve_links(links: Mapping[str, str]) -> dict[str, str]:
    """Return the target of each link. At most MAX_LINKS links are followed, because links may form a circle."""
    targets = dict(links)
    for _ in range(MAX_LINKS):
        targets = {link: links.get(name, name) for link, name in targets.items()}
    return targets
