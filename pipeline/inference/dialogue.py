"""Dialogue of several turns, whose answers are streamed and whose state is kept between turns."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from model.mamba import Cache
from pipeline.inference.decoder import Decoder, Rows
from pipeline.inference.prefill import Prefill
from pipeline.inference.requests import Pixels, Request, Sampling
from pipeline.inference.sampling import choose, request_key
from pipeline.inference.text import TextStream, cut_at_stop
from preprocess.prompts import Tokenizer, encode_prompt


class Dialogue:
    """Questions and answers about one image, or without an image.

    The states after a question and after its answer are kept, so the next question costs its own tokens only. The model
    sees the tokens that `encode_prompt` returns for the whole dialogue, as in training.

    Finish or close the iterator of an answer before the next call to the engine.

    Attributes:
        turns: Questions and answers so far, as `encode_prompt` expects them.
        saved: Pairs of tokens and the state after these tokens: after the last question, and after its answer.
    """

    def __init__(
        self,
        *,
        prefill: Prefill,
        decoder_for: Callable[[int], Decoder],
        tokenizer: Tokenizer,
        sampling: Sampling,
        image: Pixels | None,
    ) -> None:
        self.prefill, self.decoder_for = prefill, decoder_for
        self.tokenizer, self.sampling, self.image = tokenizer, sampling, image
        self.turns: list[dict[str, str]] = []
        self.saved: list[tuple[list[int], Cache]] = []

    @torch.no_grad()
    def ask(
        self, question: str, *, max_new_tokens: int = 256, stop: tuple[str, ...] = ()
    ) -> Generator[str, None, None]:
        """Ask the next question. Yield the answer in pieces of text as they are generated.

        Args:
            question: Text of the question.
            max_new_tokens: Largest number of tokens to generate.
            stop: Strings that end the answer; the answer does not contain them.
        """
        self.turns.append({"from": "human", "value": question})
        prompt = encode_prompt(self.turns, self.prefill.model.config.template, self.tokenizer)
        decoder = self.decoder_for(1)
        self._read_prompt(prompt, decoder)
        self.saved = [(prompt, decoder.take([0]).cache)]
        stream, tokens = TextStream(self.tokenizer, stop), [int(decoder.tokens[0])]
        seen = 0  # number of `tokens` that the state includes
        try:
            while tokens[-1] != self.tokenizer.eos_id:
                yield stream.add(tokens[-1])
                if stream.stopped or len(tokens) == max_new_tokens:
                    break
                decoder.step()
                seen += 1
                tokens.append(int(decoder.tokens[0]))
            yield stream.end()
        finally:
            self.saved.append((prompt + tokens[:seen], decoder.take([0]).cache))
            answer = [token for token in tokens if token != self.tokenizer.eos_id]
            text = cut_at_stop(self.tokenizer.decode(answer), stop).strip()
            self.turns.append({"from": "gpt", "value": text})

    def _read_prompt(self, prompt: list[int], decoder: Decoder) -> None:
        """Bring the decoder to the state after the prompt, and choose the first token of the answer."""
        device = decoder.keys.device
        key = torch.tensor([request_key(self.sampling.seed, len(self.turns) // 2)], device=device)
        if not self.saved:
            logits, cache = self.prefill([Request(prompt=prompt, image=self.image)])
            tokens = choose(logits, self.sampling, key, torch.zeros_like(key))
            decoder.put([0], Rows(cache=cache, tokens=tokens, keys=key, positions=torch.ones_like(key)))
            return
        # The state after the last answer is of no use if the answer's text has other tokens than the model generated,
        # for example because it was cut off. The state after the last question always fits.
        known, cache = [(tokens, cache) for tokens, cache in self.saved if prompt[: len(tokens)] == tokens][-1]
        new = prompt[len(known) :]
        # The position is 0 when the last of the new tokens is read, as after a prefill.
        decoder.put([0], Rows(cache=cache, tokens=key, keys=key, positions=torch.full_like(key, 1 - len(new))))
        for token in new:
            decoder.step(torch.full_like(decoder.tokens, token))
