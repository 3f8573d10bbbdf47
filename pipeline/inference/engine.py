"""Inference engine: load an exported model, and complete requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.errors import UserError
from model.mamba import Cache
from model.weights import LoadedModel, load_model
from pipeline.inference.dialogue import Dialogue
from pipeline.inference.requests import Completion, Pixels, Request, Sampling
from pipeline.inference.sampling import choose, request_key
from preprocess.prompts import Tokenizer, encode_prompt, load_tokenizer


def load(folder: str | Path, device: str = "auto") -> tuple[LoadedModel, Tokenizer]:
    """Load an exported model and its tokenizer: bf16 on a GPU, fp32 on a CPU.

    Raises: UserError if the folder holds no model.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_model(Path(folder), torch.device(device), dtype), load_tokenizer(folder)


class InferenceEngine:
    """Completes requests with a loaded model.

    Args:
        model: Model to run.
        tokenizer: Tokenizer of the model.
        max_batch: Largest number of requests that are decoded together.
        sampling: How the next token is chosen.
        state_dtype: Type in which the states of the scans are kept; arithmetic is fp32.
        use_graphs: Whether to replay CUDA graphs; None: if the model is on a GPU and the graphs support it.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        state_dtype: torch.dtype = torch.float32,
        use_graphs: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling

    def request(self, question: str, image: Pixels | None = None, *, max_new_tokens: int = 64) -> Request:
        """Make the request that asks one question."""
        turns = [{"from": "human", "value": question}]
        prompt = encode_prompt(turns, self.model.config.template, self.tokenizer)
        return Request(prompt=prompt, image=image, max_new_tokens=max_new_tokens)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completion of each request, in order."""
        completions = dict(self.run(requests))
        return [completions[i] for i in range(len(requests))]

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield the index and the completion of each request as soon as the completion ends.

        Requests are read only when there is room for them, so their images need not be in memory together.
        """
        for index, request in enumerate(requests):
            yield index, self._complete(request, index)

    @torch.inference_mode()
    def log_likelihoods(self, request: Request, continuations: Sequence[list[int]]) -> list[float]:
        """Return the log-probability of each continuation after the request's prompt, summed over its tokens."""
        sums = []
        for continuation in continuations:
            logits, cache = self.prefill(request)
            total = 0.0
            for token in continuation:
                total += float(logits[0].float().log_softmax(-1)[token])
                logits = self.model.emma.decode(torch.tensor([[token]], device=self.model.device), cache)
            sums.append(total)
        return sums

    def dialogue(self, image: Pixels | None = None) -> Dialogue:
        """Start a dialogue about an image, or without an image."""
        return Dialogue(lambda request: self.complete([request])[0], self.model.config.template, self.tokenizer, image)

    @torch.inference_mode()
    def _complete(self, request: Request, index: int) -> Completion:
        tokens: list[int] = []
        logits, cache = self.prefill(request)
        draw = index if request.draw is None else request.draw
        key = torch.tensor([request_key(self.sampling.seed, draw)], device=self.model.device)
        while len(tokens) < request.max_new_tokens:
            token = int(choose(logits, self.sampling, key, torch.full_like(key, len(tokens))))
            if token == self.tokenizer.eos_id:
                return Completion(tokens=tokens, text=self._text(tokens), finish_reason="stop")
            tokens.append(token)
            text = self._text(tokens) if request.stop else ""
            found = [text.index(stop) for stop in request.stop if stop in text]
            if found:
                return Completion(tokens=tokens, text=text[: min(found)].strip(), finish_reason="stop")
            logits = self.model.emma.decode(torch.tensor([[token]], device=self.model.device), cache)
        return Completion(tokens=tokens, text=self._text(tokens), finish_reason="length")

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens).strip()

    def prefill(self, request: Request) -> tuple[Tensor, Cache]:
        """Return the logits [1, vocab] after the request's prompt, and the states."""
        features, device = None, self.model.device
        if request.image is not None:
            features = self.model.towers(torch.from_numpy(request.image).permute(2, 0, 1)[None].to(device))
        return self.model.emma.prefill(torch.tensor([request.prompt], device=device), features)
