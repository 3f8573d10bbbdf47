"""Text of tokens that arrive one by one: pieces for streaming, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from preprocess.prompts import Tokenizer

INCOMPLETE = "\ufffd"  # replacement character, which ends the text of tokens that end inside a character


class TextStream:
    """Decoder that returns the text of each new token.

    Only the last tokens are decoded, so that the time per token does not grow with the length of the text.

    Attributes:
        stopped: Whether the text has reached a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.context: list[int] = []  # last tokens with complete text, because a token's text depends on its context
        self.incomplete: list[int] = []  # tokens that end inside a character
        self.held = ""  # text that may be the beginning of a stop string
        self.started = False

    def add(self, token: int) -> str:
        """Return the text that a token completes, or an empty string.

        White space at the beginning of the text is dropped. A stop string and everything after it are dropped, too.
        """
        self.incomplete.append(token)
        before, text = (self.tokenizer.decode(tokens) for tokens in (self.context, [*self.context, *self.incomplete]))
        if text.endswith(INCOMPLETE):
            return ""
        self.context, self.incomplete = self.incomplete, []
        piece = text[len(before) :] if self.started else text[len(before) :].lstrip()
        self.started = self.started or bool(piece)
        self.held += piece
        self.stopped = any(each in self.held for each in self.stop)
        self.held = cut_at_stop(self.held, self.stop)
        return "" if self.stopped else self._release(max(map(len, self.stop), default=1) - 1)

    def end(self) -> str:
        """Return the rest of the text."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        split = max(len(self.held) - keep, 0)
        released, self.held = self.held[:split], self.held[split:]
        return released


def ends_with_stop(tokens: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Return whether the last token completes a stop string."""
    if not stop:
        return False
    longest = max(len(text.encode()) for text in stop)  # also a bound in tokens, because a token has at least one byte
    text = tokenizer.decode(tokens[-longest:])
    return any(each in text for each in stop)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min([text.find(each) for each in stop if each in text], default=len(text))]
