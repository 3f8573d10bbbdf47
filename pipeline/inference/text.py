"""Text of tokens that arrive one by one: pieces for streaming, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from preprocess.prompts import Tokenizer

INCOMPLETE = "\ufffd"  # replacement character, which ends the text of tokens that end inside a character


class TextStream:
    """Decoder that returns the text of each new token.

    Only the last tokens are decoded, so that the time per token does not grow with the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context: list[
            int
        ] = []  # tokens whose text was returned last; a token's text can depend on the token before
        self.held: list[int] = []  # tokens whose text was not returned yet
        self.started = False

    def add(self, token: int) -> str:
        """Return the text that a token completes; empty if the token ends inside a character.

        White space at the beginning of the text is dropped.
        """
        self.held.append(token)
        before, text = (self.tokenizer.decode(tokens) for tokens in (self.context, [*self.context, *self.held]))
        if text.endswith(INCOMPLETE):
            return ""
        self.context, self.held = self.held, []
        piece = text[len(before) :] if self.started else text[len(before) :].lstrip()
        self.started = self.started or bool(piece)
        return piece


def ends_with_stop(tokens: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Return whether the last token completes a stop string."""
    if not stop:
        return False
    longest = max(len(text.encode()) for text in stop)  # in tokens too, because a token has at least one byte
    text = tokenizer.decode(tokens[-longest:])
    return any(each in text for each in stop)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min([text.find(each) for each in stop if each in text], default=len(text))]
