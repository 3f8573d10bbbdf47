"""Dialogue of several turns with a model, whose answers are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.inference.requests import Completion, Pixels, Request
from preprocess.prompts import Tokenizer, encode_prompt


class Dialogue:
    """Questions and answers about one image, or without an image."""

    def __init__(
        self, complete: Callable[[Request], Completion], template: str, tokenizer: Tokenizer, image: Pixels | None
    ) -> None:
        self.complete, self.template, self.tokenizer, self.image = complete, template, tokenizer, image
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str, *, max_new_tokens: int = 256, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Ask the next question. Yield the answer in pieces of text as they are generated."""
        self.turns.append({"from": "human", "value": question})
        prompt = encode_prompt(self.turns, self.template, self.tokenizer)
        request = Request(
            prompt=prompt, image=self.image, max_new_tokens=max_new_tokens, stop=stop, draw=len(self.turns) // 2
        )
        completion = self.complete(request)
        self.turns.append({"from": "gpt", "value": completion.text})
        yield completion.text
