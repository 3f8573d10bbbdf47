"""LRU cache of encoded images and of rejections, for rows of one shard that share an image."""

from __future__ import annotations

from collections import OrderedDict

from preprocess.rejects import Rejected

CACHE_BYTES = 64 << 20
ENTRY_BYTES = 1 << 10  # upper bound of Python's own overhead per entry

EncodedImage = tuple[bytes, str]  # file content, format
Rejection = tuple[str, str]  # reason, detail; an exception would keep the variables of its traceback alive


class ImageCache:
    """The most recently used images and rejections, up to CACHE_BYTES. The newest entry is kept whatever its size."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[EncodedImage | None, Rejection | None]] = OrderedDict()
        self.bytes = 0

    def get(self, path: str) -> EncodedImage | None:
        """Return the cached image of a path, or None if there is none. Raises: Rejected if its rejection is cached."""
        if path not in self._entries:
            return None
        self._entries.move_to_end(path)
        image, rejection = self._entries[path]
        if rejection:
            raise Rejected(*rejection)
        return image

    def add(self, path: str, image: EncodedImage) -> None:
        self._insert(path, image, None)

    def add_rejection(self, path: str, reason: str, detail: str) -> None:
        self._insert(path, None, (reason, detail))

    def _insert(self, path: str, image: EncodedImage | None, rejection: Rejection | None) -> None:
        self._entries[path] = image, rejection
        self.bytes += _size(image)
        while self.bytes > CACHE_BYTES and len(self._entries) > 1:
            self.bytes -= _size(self._entries.popitem(last=False)[1][0])


def _size(image: EncodedImage | None) -> int:
    return ENTRY_BYTES + (len(image[0]) if image else 0)
