"""Images, videos and audio that rows name in other ways than by the key `image`, as other data sets do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MEDIA_KEY = re.compile("image|img|picture|photo|video|audio", re.IGNORECASE)

_MEDIUM = "(?:image|img|picture|photo|video|audio)"
# Tags that HTML does not have, such as <img>a.jpg</img>, <|image_1|>, <image 1>, <video_pad> and <|vision_start|>.
_PLACEHOLDER = re.compile(
    rf"<img>[^<>\n]{{1,1000}}</img>|<\|{_MEDIUM}\|>|<\|?{_MEDIUM}[ _-]?(?:\d+|pad|start|end|token|placeholder|here)\|?>"
    r"|<\|vision_(?:start|end|pad)\|>",
    re.IGNORECASE,
)
# Tags that texts about HTML and forum posts contain, too: <video>, [IMG], <img src="a.jpg">, ![alt](a.jpg).
_TAG = rf"(?<!\w)(?:<{_MEDIUM}>|\[{_MEDIUM}(?:[ _-]?\d+)?\])"
_TAG_AT_EDGE = re.compile(rf"\A\s*{_TAG}(?!\S)|(?<!\S){_TAG}\s*\Z", re.IGNORECASE)
_MENTION = re.compile(rf"{_TAG}|<{_MEDIUM}\s[^<>]{{0,1000}}>|!\[[^\]\n]{{0,200}}\]\([^)\s]{{1,1000}}\)", re.IGNORECASE)


def find_reference(row: Mapping[str, Any], texts: Iterable[str]) -> str | None:
    """Describe how a row without `image` refers to an image, video or audio. Return None if it does not.

    Tags like <video> are references only at the start or end of a text, because texts about HTML contain them as well.
    """
    turns = row.get("conversations")
    for place, holder in (("row", row), *(("turn", turn) for turn in (turns if isinstance(turns, list) else ()))):
        for key, value in holder.items():
            if _MEDIA_KEY.search(key) and _is_given(value):
                return f"a {place} has {key!r}, expected 'image' in the row"
    for text in texts:
        if match := _PLACEHOLDER.search(text) or _TAG_AT_EDGE.search(text):
            return f"the text holds {match[0].strip()[:80]}, the row no image"
    return None


def has_mention(texts: Iterable[str]) -> bool:
    """Return whether a text contains a tag that may stand for an image, video or audio."""
    return any(_MENTION.search(text) for text in texts)


def _is_given(value: Any) -> bool:
    """Return whether a value names something: it is not null, false, zero, not a number, or empty on every level."""
    if isinstance(value, dict):
        return any(map(_is_given, value.values()))
    if isinstance(value, list):
        return any(map(_is_given, value))
    if isinstance(value, str):
        return bool(value.strip())
    return not isinstance(value, bool) and bool(value) and value == value  # nan differs from itself
