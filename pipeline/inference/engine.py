"""Inference engine: load an exported model, and complete requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.errors import UserError
from model.mamba import Cache, State
from model.weights import LoadedModel, load_model
from pipeline.inference.decoder import Decoder, EagerDecoder, GraphDecoder, Rows
from pipeline.inference.dialogue import Dialogue
from pipeline.inference.prefill import Prefill, next_power_of_2
from pipeline.inference.requests import Completion, Pixels, Request, Sampling
from pipeline.inference.scheduler import Scheduler
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

    Attributes:
        mark: Called during `run` with the phase that was just computed, or launched on a GPU: "image", "prompt" (the
            prefill and the first token) or "token". `pipeline.latency` sets this attribute to measure the phases.
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
        self.max_batch, self.state_dtype = max_batch, state_dtype
        self.use_graphs = model.device.type == "cuda" if use_graphs is None else use_graphs
        self.mark: Callable[[str], None] = lambda phase: None
        self.prefill = Prefill(
            model, state_dtype=state_dtype, use_graphs=self.use_graphs, mark=lambda phase: self.mark(phase)
        )
        self.decoders: dict[int, Decoder] = {}

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

        Finish or close the iterator before the next call to the engine.
        """
        scheduler = Scheduler(
            requests,
            prefill=self.prefill,
            decoder_for=self._decoder,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            max_batch=self.max_batch,
            mark=self.mark,
        )
        return scheduler.run()

    @torch.no_grad()
    def log_likelihoods(self, request: Request, continuations: Sequence[list[int]]) -> list[float]:
        """Return the log-probability of each continuation after the request's prompt, summed over its tokens."""
        sums: list[float] = []
        logits, cache = self.prefill([request])
        logits, cache = logits.clone(), [State(*(part.clone() for part in state)) for state in cache]
        for start in range(0, len(continuations), self.max_batch):
            sums += self._sum_log_likelihoods(logits, cache, continuations[start : start + self.max_batch])
        return sums

    def dialogue(self, image: Pixels | None = None) -> Dialogue:
        """Start a dialogue about an image, or without an image."""
        return Dialogue(
            prefill=self.prefill,
            decoder_for=self._decoder,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            image=image,
        )

    def _sum_log_likelihoods(self, logits: Tensor, cache: Cache, continuations: Sequence[list[int]]) -> list[float]:
        decoder, rows, device = self._decoder(len(continuations)), len(continuations), logits.device
        rows_of_tokens = [*continuations, *([] for _ in range(decoder.batch - rows))]
        lengths = torch.tensor([len(tokens) for tokens in rows_of_tokens], device=device)
        longest = max(map(len, continuations))
        tokens = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in rows_of_tokens], device=device)
        keys = torch.zeros(rows, dtype=torch.int64, device=device)
        repeated = [State(*(part.expand(rows, *part.shape[1:]) for part in state)) for state in cache]
        decoder.put(range(rows), Rows(cache=repeated, tokens=keys, keys=keys, positions=keys))
        logits = logits.expand(decoder.batch, -1)
        sums = torch.zeros(decoder.batch, dtype=torch.float64, device=device)
        for position in range(longest):
            if position:
                logits = decoder.step(tokens[:, position - 1])
            each = logits.float().log_softmax(-1).gather(1, tokens[:, position, None])[:, 0]
            sums += each.where(lengths > position, 0)
        return sums[:rows].tolist()

    def _decoder(self, rows: int) -> Decoder:
        """Return a decoder of at least `rows` rows, at most `max_batch`. Decoders are made once per batch size."""
        batch = min(next_power_of_2(rows), self.max_batch)
        if batch not in self.decoders:
            llm = self.model.emma.llm
            fused = self.use_graphs and (llm.config.kind == "mamba1" or llm.config.num_groups == 1)
            decoder_class = GraphDecoder if fused else EagerDecoder
            self.decoders[batch] = decoder_class(llm, batch, self.sampling, self.state_dtype)
        return self.decoders[batch]
