"""JPEG structure: markers, scans, and damage that decoders replace by grey or noise without an error.

Layout: SOI, segments (FF, marker, length, payload), then for each scan an SOS segment and its entropy-coded data, EOI.
In entropy-coded data, FF 00 stands for a data byte FF, and restart markers (RST) may occur at regular intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DHT, _EOI, _SOS, _DRI = 0xC4, 0xD9, 0xDA, 0xDD
_PROGRESSIVE = 0xC2
_HUFFMAN_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)
_WITHOUT_PAYLOAD = (0x01, *range(0xD0, 0xD8))

_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff(?![\x00\xd0-\xd7])")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")

OVERWRITTEN = "its data was overwritten by zeros"
ZEROS = bytes(512)  # a sector of a disk
_ZEROS_BEFORE_END = re.compile(rb"\0{512,}(?=\xff\xd9\Z)")
_END_OF_BLOCK = 0x00
# Bytes that a decoder reads only if the data of a scan ends early. They differ from what it would fill in by itself.
_EXTRA = bytes(range(1, 65))


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A marker segment from `start` to `end`. The entropy-coded data of a scan follows, up to `data_end`."""

    marker: int
    start: int
    payload: bytes
    end: int
    data_end: int


def segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments of a JPEG before its end marker, or before the point where its structure breaks."""
    position = 2
    while (match := _MARKER.search(data, position)) and match[1][0] != _EOI:
        marker, position = match[1][0], match.end()
        if marker in _WITHOUT_PAYLOAD:
            continue
        end = data_end = position + int.from_bytes(data[position : position + 2], "big")
        if marker == _SOS:
            after = _END_OF_SCAN.search(data, end)
            data_end = after.start() if after else len(data)
        payload = data[position + 2 : end]
        yield Segment(marker=marker, start=match.start(), payload=payload, end=end, data_end=data_end)
        position = data_end


def with_extra_data(data: bytes) -> bytes:
    """Add bytes to the end of each scan and restart interval.

    A decoder ignores these bytes if the data is complete. If the data ends early, it decodes them in place of grey.
    """
    pieces, position = [], 0
    for segment in segments(data):
        if segment.marker == _SOS:
            scan = _RESTART.sub(lambda match: _EXTRA + match[0], data[segment.end : segment.data_end])
            pieces += [data[position : segment.end], scan, _EXTRA]
            position = segment.data_end
    return b"".join([*pieces, data[position:]])


def with_other_end(data: bytes) -> bytes | None:
    """Replace the last eighth of a JPEG's entropy-coded data. Return None if the last scan is progressive or shorter.

    The pixels change, unless a decoder has decoded the whole image from the data before.
    """
    size = max(len(data) // 8, len(ZEROS))
    *_, scan = (segment for segment in segments(data) if segment.marker == _SOS)
    if _PROGRESSIVE in _frame_markers(data) or scan.data_end - scan.end < size:
        return None
    return data[: scan.data_end - size] + b"\x55" * size + data[scan.data_end :]


def without_zeros_before_end(data: bytes) -> bytes:
    """Drop a long run of zeros directly before the end marker at the end of the file."""
    return _ZEROS_BEFORE_END.sub(b"", data) if data.endswith(ZEROS + b"\xff\xd9") else data


def has_huffman_codes(data: bytes) -> bool:
    return any(marker in _HUFFMAN_FRAMES for marker in _frame_markers(data))


def _frame_markers(data: bytes) -> list[int]:
    return [segment.marker for segment in segments(data) if segment.marker in range(0xC0, 0xD0)]


def find_damage(data: bytes) -> str | None:
    """Describe damage that shows in the structure of a JPEG with Huffman codes. Return None if there is none.

    Parts of the image are missing if restart markers or scans are missing. Data was overwritten if it contains a long
    run of zeros that cannot be the codes of flat colour.
    """
    frame = _Frame()
    try:
        for segment in segments(data):
            frame.read(segment)
            if segment.marker == _SOS and (
                damage := _scan_damage(frame, segment, data[segment.end : segment.data_end])
            ):
                return damage
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        return None  # decoders report a broken header better
    return "scans are missing" if any(len(coded) < 64 for coded in frame.coded.values()) else None


class _Frame:
    """Properties of the image and of its next scan, collected from the segments before this scan.

    Attributes:
        sampling: Horizontal and vertical sampling factor of each component.
        zero_code: For each Huffman table, the symbol whose code consists of zeros.
        coded: For each component of a progressive JPEG, the coefficients that have been sent at full precision.
    """

    def __init__(self) -> None:
        self.height = self.width = self.restart_interval = 0
        self.sampling: dict[int, tuple[int, int]] = {}
        self.zero_code: dict[int, int] = {}
        self.coded: dict[int, set[int]] = {}

    def read(self, segment: Segment) -> None:
        payload = segment.payload
        if segment.marker in _HUFFMAN_FRAMES:
            self.height, self.width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
            for start in range(6, 6 + 3 * payload[5], 3):
                self.sampling[payload[start]] = payload[start + 1] >> 4, payload[start + 1] & 15
            self.coded = {component: set() for component in self.sampling} if segment.marker == _PROGRESSIVE else {}
        elif segment.marker == _DRI:
            self.restart_interval = int.from_bytes(payload[:2], "big")
        elif segment.marker == _DHT:
            start = 0  # of a table: its number, the number of codes of each length from 1 to 16, and the symbols
            while start + 17 < len(payload):
                self.zero_code[payload[start]] = payload[start + 17]
                start += 17 + sum(payload[start + 1 : start + 17])

    def coding_units(self, components: Sequence[int]) -> int:
        """Return the number of coding units (MCUs) of a scan: blocks of one component, or groups of blocks of all."""
        units = 1
        for axis, pixels in enumerate((self.width, self.height)):
            most = max(factors[axis] for factors in self.sampling.values())
            own = self.sampling[components[0]][axis] if len(components) == 1 else 1
            units *= -(-pixels * own // (8 * most))
        return units


def _scan_damage(frame: _Frame, scan: Segment, data: bytes) -> str | None:
    count = scan.payload[0]
    components, tables = scan.payload[1 : 1 + 2 * count : 2], scan.payload[2 : 2 + 2 * count : 2]
    first, last, precision = scan.payload[1 + 2 * count : 4 + 2 * count]
    for component in components:
        if frame.coded and precision & 15 == 0:
            frame.coded[component].update(range(first, last + 1))
    if frame.restart_interval and frame.height:
        expected = -(-frame.coding_units(components) // frame.restart_interval) - 1
        found = [match[0] & 7 for match in _RESTART.findall(data)][:expected]
        if found != [number % 8 for number in range(expected)]:
            return "restart markers are missing"
    refines = precision >> 4 > 0
    # Zeros can be the codes of flat blocks, of the means of equal blocks, or of equal bits in a refinement.
    symbols = [frame.zero_code.get(0x10 | table & 15, _END_OF_BLOCK) for table in tables]
    if ZEROS in data and last > 0 and not refines and any(symbol != _END_OF_BLOCK for symbol in symbols):
        return OVERWRITTEN
    return None
