"""Tars as tarfile writes them, byte for byte, in half of its time: members differ in name and size alone."""

from __future__ import annotations

import functools
import tarfile
from typing import Protocol

MODE, OWNER = 0o444, "emma"
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)


class Sink(Protocol):
    size: int

    def write(self, data: bytes, /) -> int: ...


def add_member(sink: Sink, name: str, data: bytes) -> int:
    """Writes a file; returns the offset of its bytes."""
    sink.write(_header(name.encode(), len(data)))
    offset = sink.size
    sink.write(data)
    sink.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def end_tar(sink: Sink) -> None:
    sink.write(bytes(2 * tarfile.BLOCKSIZE))
    sink.write(bytes(-sink.size % tarfile.RECORDSIZE))


def _header(name: bytes, size: int) -> bytes:
    assert len(name) <= 100, f"{name!r} is too long for a header"
    blank, blank_sum = _blank()
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (blank_sum + sum(name) + sum(digits))
    return b"".join(
        (name, blank[len(name) : _SIZE.start], digits, blank[_SIZE.stop : _SUM.start], checksum, blank[_SUM.stop :])
    )


@functools.cache
def _blank() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the sum of its bytes; the checksum's count as spaces."""
    member = tarfile.TarInfo()
    member.mode, member.uname, member.gname = MODE, OWNER, OWNER
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[_NAME], header[_SIZE], header[_SUM] = bytes(100), bytes(12), b" " * 8
    return bytes(header), sum(header)
