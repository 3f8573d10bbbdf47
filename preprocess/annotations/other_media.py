"""Images, videos and audio that rows name in other ways than by the key `image`, as other data sets do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MEDIA_KEY = re.compile("image|img|picture|photo|video|audio", re.IGNORECASE)
_TEXT_KEYS = ("id", "conversations", "from", "value")
_MEDIA_FILE = re.compile(
    r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif|mp4|m4v|webm|mov|avi|mkv|wav|mp3|flac|ogg|m4a)(?:\?\S*)?",
    re.IGNORECASE,
)

_MEDIUM = "(?:image|img|picture|photo|video|audio)"
# Tags that HTML does not have, such as <img>a.jpg</img>, <|image_1|>, <image 1>, <IMG_CONTEXT> and <|vision_start|>.
_PLACEHOLDER = re.compile(
    rf"<img>\s*[^<>\n]{{1,1000}}</img>|<\|{_MEDIUM}\|>|<im_(?:start|patch|end)>|<fake_token_around_image>"
    rf"|<\|?{_MEDIUM}[ _:-]?(?:\d+|pad|start|end|bos|eos|(?:soft_?)?token|patch|context|placeholder|here)\|?>"
    rf"|<\|?(?:start|end|begin)_of_{_MEDIUM}\|?>|<\|(?:vision|media)_(?:start|begin|content|end|pad)\|>",
    re.IGNORECASE,
)
# Tags that texts about HTML and forum posts contain, too: <video>, [IMG], <img src="a.jpg">, ![alt](a.jpg).
_TAG = rf"(?<!\w)(?:<{_MEDIUM}s?>|\[{_MEDIUM}(?:[ _-]?\d+)?\])"
_TAG_AT_EDGE = re.compile(rf"\A\s*{_TAG}(?!\S)|(?<!\S){_TAG}\s*\Z", re.IGNORECASE)
_MENTION = re.compile(
    rf"{_TAG}|(?<!\w)<[^<>\s]{{0,40}}{_MEDIUM}[^<>]{{0,1000}}>|!\[[^\]\n]{{0,200}}\]\([^)\s]{{1,1000}}\)", re.IGNORECASE
)


def find_reference(row: Mapping[str, Any], texts: Iterable[str]) -> str | None:
    """Describe how a row without `image` refers to an image, video or audio. Return None if it does not.

    Tags like <video> are references only at the start or end of a text, because texts about HTML contain them as well.
    """
    turns = row.get("conversations")
    for place, holder in (("row", row), *(("turn", turn) for turn in (turns if isinstance(turns, list) else ()))):
        for key, value in holder.items():
            if key not in _TEXT_KEYS and any(_is_medium(key, leaf) for leaf in _leaves(value)):
                return f"a {place} has {key!r}, expected 'image' in the row"
    for text in texts:
        if match := _PLACEHOLDER.search(text) or _TAG_AT_EDGE.search(text):
            return f"the text holds {match[0].strip()[:80]}, the row no image"
    return None


def has_mention(texts: Iterable[str]) -> bool:
    """Return whether a text contains a tag that may stand for an image, video or audio."""
    return any(_MENTION.search(text) for text in texts)


def _is_medium(key: str, value: Any) -> bool:
    """Return whether a value is the path of a media file, or names something under a key that speaks of media.

    False, zero, null, blank text and nan name nothing.
    """
    if isinstance(value, str) and _MEDIA_FILE.fullmatch(value.strip()):
        return True
    given = bool(value.strip()) if isinstance(value, str) else bool(value) and value == value  # nan differs from itself
    return given and not isinstance(value, bool) and bool(_MEDIA_KEY.search(key))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside lists and objects. Values may be nested too deeply for a recursive function."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value
