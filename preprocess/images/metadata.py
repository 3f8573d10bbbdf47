"""Metadata of image files: reading the orientation, and dropping everything else that pixels do not depend on."""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from preprocess.images.jpeg_structure import segments
from preprocess.images.png_structure import png_chunks

Pixels = npt.NDArray[np.uint8]

MAX_PACKET_BYTES = 1 << 22  # compressed packets are not decompressed beyond this size

_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # TIFF type -> struct format
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])")
_XMP_IN_PNG = b"XML:com.adobe.xmp"
_EXIF_IN_PNG = b"Raw profile type exif"
_HEX_OF_EXIF = re.compile(rb"\s*exif\s+\d+\s+([0-9a-fA-F\s]*)")

# Segments that the colours of a JPEG depend on: JFIF and Adobe headers, with their least payload in bytes.
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_COLOUR_HEADERS = {_APP0: (b"JFIF\0", 12), _APP14: (b"Adobe", 12)}
# Tags that the pixels of a TIFF depend on, from its dimensions to its tiles, tables and colours.
_PIXEL_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320}
    | {322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
)


# -- Orientation -----------------------------------------------------------------------------------------------------


def orientation(data: bytes, image_format: str) -> int:
    """Return the orientation of an image file, from 1 to 8, by its EXIF or else its XMP data. 1 is upright.

    Metadata that cannot be parsed is ignored. TIFFs count as upright, because Pillow turns them when it decodes them.
    """
    packets: list[tuple[bool, bytes]] = []  # (whether the packet is EXIF, content)
    if image_format in _PACKETS:
        with contextlib.suppress(struct.error, ValueError, zlib.error):
            packets.extend(_PACKETS[image_format](data))
    for is_exif, parse in ((True, _exif_orientation), (False, _xmp_orientation)):
        for packet in (content for exif, content in packets if exif == is_exif):
            with contextlib.suppress(struct.error):
                if found := parse(packet):
                    return found
    return 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn pixels [h, w, 3] that are stored with an EXIF orientation from 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _exif_orientation(packet: bytes) -> int | None:
    """Return the orientation in the first directory of an EXIF packet, which has the layout of a TIFF."""
    packet = packet.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(packet[:2])
    if order is None:
        return None
    (start,) = struct.unpack_from(f"{order}I", packet, 4)
    (count,) = struct.unpack_from(f"{order}H", packet, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", packet, entry)
        if tag == _ORIENTATION and kind in _INTEGERS:
            (value,) = struct.unpack_from(order + _INTEGERS[kind], packet, entry + 8)
            return value if 1 <= value <= 8 else None
    return None


def _xmp_orientation(packet: bytes) -> int | None:
    match = _XMP.search(packet)
    return int(match[1]) if match else None


def _jpeg_packets(data: bytes) -> Iterator[tuple[bool, bytes]]:
    if b"Exif\0" not in data and b"tiff:Orientation" not in data:
        return
    for segment in segments(data):
        if segment.marker == _APP1:
            yield segment.payload.startswith(b"Exif\0"), segment.payload


def _png_packets(data: bytes) -> Iterator[tuple[bool, bytes]]:
    for kind, start, end in png_chunks(data):
        content = data[start + 8 : end - 4]
        keyword, _, text = content.partition(b"\0")
        if kind == b"eXIf":
            yield True, content
        elif kind == b"iTXt" and keyword == _XMP_IN_PNG:
            packet = text[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
            yield False, _inflate(packet) if text[:1] == b"\1" else packet
        elif kind in (b"tEXt", b"zTXt") and keyword == _EXIF_IN_PNG:
            profile = _inflate(text[1:]) if kind == b"zTXt" else text
            if match := _HEX_OF_EXIF.match(profile):
                yield True, bytes.fromhex(match[1].decode())


def _webp_packets(data: bytes) -> Iterator[tuple[bool, bytes]]:
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind in (b"EXIF", b"XMP "):
            yield kind == b"EXIF", data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


_PACKETS = {"jpg": _jpeg_packets, "png": _png_packets, "webp": _webp_packets}


def _inflate(compressed: bytes) -> bytes:
    return zlib.decompressobj().decompress(compressed, MAX_PACKET_BYTES)


# -- Dropping metadata -----------------------------------------------------------------------------------------------


def without_metadata(data: bytes, image_format: str) -> bytes:
    """Return an image file with the same pixels and without metadata, on which decoders might fail."""
    if image_format == "png":
        return _png_without_metadata(data)
    if image_format == "jpg":
        return _jpeg_without_metadata(data)
    return _tiff_without_metadata(data) if image_format == "tiff" else data


def _png_without_metadata(data: bytes) -> bytes:
    """Keep critical chunks, which have a capital letter first, and transparency."""
    pieces, end = [data[:8]], 8
    for kind, start, end in png_chunks(data):
        if kind[:1].isupper() or kind == b"tRNS":
            pieces.append(data[start:end])
    return b"".join([*pieces, data[end:]])


def _jpeg_without_metadata(data: bytes) -> bytes:
    pieces, position = [], 0
    for segment in segments(data):
        if _APP0 <= segment.marker <= _APP0 + 15 or segment.marker == _COMMENT:
            prefix, least = _COLOUR_HEADERS.get(segment.marker, (b"", 1 << 16))
            if not segment.payload.startswith(prefix) or len(segment.payload) < least:
                pieces.append(data[position : segment.start])
                position = segment.end
    return b"".join([*pieces, data[position:]])


def _tiff_without_metadata(data: bytes) -> bytes:
    """Keep the entries of the first directory that pixels depend on. Further directories are dropped."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _PIXEL_TAGS]
    except struct.error:
        return data
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
