"""What lately came of pictures, for rows that share one and stand near each other."""

from __future__ import annotations

from collections import OrderedDict

from preprocess.rejects import Rejected

RECENT_BYTES = 64 << 20
ENTRY_BYTES = 1 << 10  # more than what Python needs to keep one, whatever it holds

Stored = tuple[bytes, str]
Refused = tuple[str, str]  # not the exception: its traceback would keep, in a cycle, whoever raised it


class ImageCache:
    """The last RECENT_BYTES of stored pictures and of rejections; the latest one is kept at any size."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Stored | None, Refused | None]] = OrderedDict()
        self.bytes = 0

    def get(self, path: str) -> Stored | None:
        """None if it is not known. Raises: Rejected if it was."""
        if path not in self._kept:
            return None
        self._kept.move_to_end(path)
        stored, refused = self._kept[path]
        if refused:
            raise Rejected(*refused)
        return stored

    def keep(self, path: str, stored: Stored) -> None:
        self._add(path, stored, None)

    def keep_rejected(self, path: str, reason: str, detail: str) -> None:
        self._add(path, None, (reason, detail))

    def _add(self, path: str, stored: Stored | None, refused: Refused | None) -> None:
        self._kept[path] = stored, refused
        self.bytes += _size(stored)
        while self.bytes > RECENT_BYTES and len(self._kept) > 1:
            self.bytes -= _size(self._kept.popitem(last=False)[1][0])


def _size(stored: Stored | None) -> int:
    return ENTRY_BYTES + (len(stored[0]) if stored else 0)
