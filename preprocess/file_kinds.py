"""File kinds by their first bytes, to name what was found in place of the expected kind of file."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 512  # enough for the magic bytes of a tar, which are at offset 257

_LFS, _TEXT, _DAMAGED = "fetch the file itself with `git lfs pull`", "convert it to UTF-8", "download it again"
_UNPACK, _EXPECTED = "unpack it", "give a file of the expected kind"
_PATTERNS: tuple[tuple[str, str, bytes], ...] = (
    ("a Git LFS pointer", _LFS, rb"version https://git-lfs"),
    ("a git-annex pointer", "fetch the file itself with `git annex get`", rb"(\.\./)*(\.git)?/annex/objects/"),
    ("UTF-32 text", _TEXT, rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    ("UTF-16 text", _TEXT, rb"\xff\xfe|\xfe\xff|[\[{#\"\w\s]\0[^\0]\0|\0[\[{#\"\w\s]\0[^\0]"),
    ("an HTML or XML page", _DAMAGED, rb"(\xef\xbb\xbf)?\s*<(?i:!doctype|!--|html|head|body|title|script|\?xml|error)"),
    ("a gzip file", _UNPACK, rb"\x1f\x8b"),
    ("a compressed .Z file", _UNPACK, rb"\x1f\x9d"),
    ("a zstd file", _UNPACK, rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # pzstd starts files with the latter
    ("a bzip2 file", _UNPACK, rb"BZh[1-9]"),
    ("an xz file", _UNPACK, rb"\xfd7zXZ"),
    ("an lz4 file", _UNPACK, rb"\x04\x22\x4d\x18"),
    ("a zip file", _UNPACK, rb"PK(\x03\x04|\x05\x06)"),
    ("a 7z file", _UNPACK, rb"7z\xbc\xaf\x27\x1c"),
    ("a RAR file", _UNPACK, rb"Rar!\x1a\x07"),
    ("a tar file", _UNPACK, rb".{257}ustar"),
    ("a Parquet file", _EXPECTED, rb"PAR1"),
    ("an Arrow file", _EXPECTED, rb"ARROW1"),
    ("a PDF file", _EXPECTED, rb"%PDF"),
)
COMPRESSED = ("a gzip file", "a compressed .Z file", "a zstd file", "a bzip2 file", "an xz file", "an lz4 file")


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file, such as "a gzip file", and what to do with it, such as "unpack it"."""

    name: str
    remedy: str


_KINDS = tuple(
    (FileKind(name=name, remedy=remedy), re.compile(pattern, re.DOTALL)) for name, remedy, pattern in _PATTERNS
)


def recognise(head: bytes) -> FileKind | None:
    """Return the kind of a file from its first `HEAD_BYTES` bytes, or None if its kind is not in the list."""
    return next((kind for kind, pattern in _KINDS if pattern.match(head)), None)
