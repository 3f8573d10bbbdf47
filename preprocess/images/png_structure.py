"""PNG structure: chunks, and the checksums of the pixel data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, start and end of each chunk of a PNG, up to its last chunk or to one that is cut off."""
    position = 8
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if end > len(data):
            return
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end


def has_damaged_data(data: bytes) -> bool:
    """Return whether a checksum of the pixel data is wrong, and the checksum of the uncompressed data is wrong, too."""
    parts = [(start, end) for kind, start, end in png_chunks(data) if kind == b"IDAT"]
    if all(zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big") for start, end in parts):
        return False
    inflater = zlib.decompressobj()
    try:
        for start, end in parts:
            rest = data[start + 8 : end - 4]
            while rest and not inflater.eof:
                inflater.decompress(rest, 1 << 20)
                rest = inflater.unconsumed_tail
    except zlib.error:
        return True
    return not inflater.eof
