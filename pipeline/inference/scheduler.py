"""Continuous batching: rows that end leave the batch, and waiting requests take their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.inference.decoder import Decoder, Rows
from pipeline.inference.prefill import Prefill
from pipeline.inference.requests import Completion, FinishReason, Request, Sampling
from pipeline.inference.sampling import choose, request_key
from pipeline.inference.text import cut_at_stop, ends_with_stop
from pipeline.inference.transfer import HostCopy, to_device
from preprocess.prompts import Tokenizer

# Steps that are launched before the tokens of a step are read, so that a GPU never waits for the host.
LAG = {"cuda": 2, "cpu": 0}
# Bounds on the memory of a prefill.
MAX_PREFILL_ROWS, MAX_PREFILL_POSITIONS = 16, 16_384
# A prefill waits until one in this many rows is free, because a prefill of few rows takes longer per row.
MIN_FREE_SHARE = 8
# A smaller decoder takes over when at most one in this many rows is in use.
SHRINK = 4


@dataclass(kw_only=True, eq=False)
class _Row:
    """A request in the batch.

    launched    number of tokens that were computed or whose computation was launched
    """

    index: int
    request: Request
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token: int, tokenizer: Tokenizer) -> bool:
        """Append a token. Return whether the completion ends here."""
        if token == tokenizer.eos_id:
            self.finish_reason = "stop"
            return True
        self.tokens.append(token)
        if ends_with_stop(self.tokens, self.request.stop, tokenizer):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def completion(self, tokenizer: Tokenizer) -> Completion:
        assert self.finish_reason is not None
        text = cut_at_stop(tokenizer.decode(self.tokens), self.request.stop).strip()
        return Completion(tokens=self.tokens, text=text, finish_reason=self.finish_reason)


class Scheduler:
    """One run over a stream of requests.

    Args:
        requests: Requests, which are read when there is room for them.
        prefill: Prefill of the model.
        decoder_for: Returns a decoder of at least the given number of rows, or of `max_batch` rows.
        tokenizer: Tokenizer of the model.
        sampling: How the next token is chosen.
        max_batch: Largest number of rows.
        mark: Called with "prompt" after a prefill and with "token" after a step.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        prefill: Prefill,
        decoder_for: Callable[[int], Decoder],
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_batch: int,
        mark: Callable[[str], None],
    ) -> None:
        self.prefill, self.decoder_for = prefill, decoder_for
        self.tokenizer, self.sampling, self.mark = tokenizer, sampling, mark
        self.unread = enumerate(requests)
        self.waiting: list[tuple[int, Request]] = []
        self.arrivals: deque[tuple[list[_Row | None], HostCopy]] = deque()  # tokens, and the rows that they belong to
        self._read(max_batch)
        self.decoder = decoder_for(max(len(self.waiting), 1))
        self.slots: list[_Row | None] = [None] * self.decoder.batch

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, Completion]]:
        """Yield the index and the completion of each request as soon as the completion ends."""
        while True:
            self._admit()
            if any(self.slots):
                self.decoder.step()
                self.mark("token")
                self._expect(list(self.slots), self.decoder.tokens)
            elif not self.arrivals:
                return
            yield from self._collect()

    def _read(self, count: int) -> None:
        """Read requests until `count` of them are waiting, or none is left."""
        while len(self.waiting) < count and (item := next(self.unread, None)) is not None:
            self.waiting.append(item)

    def _admit(self) -> None:
        """Prefill waiting requests into free rows."""
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        if len(free) < max(len(self.slots) // MIN_FREE_SHARE, 1):
            return
        self._read(len(free))
        if not self.waiting:
            self._shrink()
        self.waiting.sort(key=lambda item: self.prefill.length(item[1]))  # rows of one prefill need little padding
        while self.waiting and free:
            count = min(len(free), len(self.waiting), MAX_PREFILL_ROWS)
            longest = self.prefill.length(self.waiting[count - 1][1])
            count = min(count, max(MAX_PREFILL_POSITIONS // longest, 1))
            group, self.waiting = self.waiting[:count], self.waiting[count:]
            self._start([_Row(index=i, request=request) for i, request in group], free[:count])
            free = free[count:]

    def _start(self, rows: list[_Row], slots: list[int]) -> None:
        """Prefill new rows and choose their first tokens."""
        for slot, row in zip(slots, rows, strict=True):
            self.slots[slot] = row
        logits, cache = self.prefill([row.request for row in rows])
        draws = [row.index if row.request.draw is None else row.request.draw for row in rows]
        keys = to_device([request_key(self.sampling.seed, draw) for draw in draws], logits.device)
        tokens = choose(logits, self.sampling, keys, torch.zeros_like(keys))
        new = Rows(cache=cache, tokens=tokens, keys=keys, positions=torch.ones_like(keys))
        self._expect([*rows], tokens)
        self.decoder.put(slots, new)
        self.mark("prompt")

    def _shrink(self) -> None:
        """Move to a smaller decoder if few rows are left."""
        used = [slot for slot, row in enumerate(self.slots) if row is not None]
        if not used or SHRINK * len(used) > self.decoder.batch:
            return
        smaller = self.decoder_for(len(used))
        smaller.put(range(len(used)), self.decoder.take(used))
        rows = [self.slots[slot] for slot in used]
        self.decoder, self.slots = smaller, rows + [None] * (smaller.batch - len(used))

    def _expect(self, rows: list[_Row | None], tokens: Tensor) -> None:
        """Begin to copy tokens to the host. Free the slots of rows that now have all their tokens."""
        self.arrivals.append((rows, HostCopy(tokens)))
        for row in rows:
            if row is not None:
                row.launched += 1
                if row.launched == row.request.max_new_tokens:
                    self._free(row)

    def _free(self, row: _Row) -> None:
        if row in self.slots:
            self.slots[self.slots.index(row)] = None

    def _collect(self) -> Iterator[tuple[int, Completion]]:
        """Add tokens that have arrived to their rows. Yield the completions that end."""
        lag = LAG[self.decoder.keys.device.type] if any(self.slots) else 0
        while len(self.arrivals) > lag:
            rows, tokens = self.arrivals.popleft()
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row is None or row.finish_reason is not None:  # tokens after the end are dropped
                    continue
                if row.add(token, self.tokenizer):
                    self._free(row)
                    yield row.index, row.completion(self.tokenizer)
