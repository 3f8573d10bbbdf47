"""The cases that a call measures, the most important ones first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.latency.measure import Case, Implementation

FIRST_BATCHES = {"ours": (1, 64), "transformers": (1, 16), "mamba_ssm": (1, 64)}
MODELS_FIRST, PEERS_FIRST, LENGTHS, OTHER_BATCHES, REST = range(5)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a call measures.

    models     presets or exported folders, which run with each type of states
    others     presets to compare them with, which run with the first type of states only
    peers      names in `peers.PEERS`
    loop       whether to run mamba_ssm's own loop with the language models of `models`
    states     types of the states
    dtype      type of weights, keys and values
    batches    batch sizes at which `tokens` tokens are generated
    lengths    numbers of tokens that are generated at batch 1
    graphs     whether there are CUDA graphs
    """

    models: Sequence[str]
    others: Sequence[str]
    peers: Sequence[str]
    loop: bool
    states: Sequence[str]
    dtype: str
    batches: Sequence[int]
    lengths: Sequence[int]
    tokens: int
    graphs: bool

    def cases(self) -> list[Case]:
        """Return the cases in the order of their importance.

        The models come first, at the batch sizes in FIRST_BATCHES. What they are compared with follows at these batch
        sizes, then the lengths, then the other batch sizes. The remaining cases without the graph come last.
        """
        cases = list(dict.fromkeys(self._cases()))
        order = {subject: number for number, subject in enumerate(dict.fromkeys(map(_subject, cases)))}
        return sorted(cases, key=lambda case: (self._stage(case), order[_subject(case)]))

    def _stage(self, case: Case) -> int:
        slow = self.graphs and not case.graph
        if case.tokens != self.tokens:
            return REST if slow else LENGTHS
        if case.batch not in FIRST_BATCHES[case.implementation]:
            return REST if slow else OTHER_BATCHES
        ours = case.implementation == "ours"
        if slow and ours and case.state != self.states[0]:
            return REST
        return MODELS_FIRST if ours and case.model in self.models else PEERS_FIRST

    def _cases(self) -> Iterator[Case]:
        graphs = (True, False) if self.graphs else (False,)
        for implementation, model, states in self._subjects():
            sizes = [(state, batch, self.tokens) for batch in self.batches for state in states]
            sizes += [(states[0], 1, length) for length in self.lengths]
            for (state, batch, tokens), graph in itertools.product(sizes, graphs):
                yield Case(
                    model=model, implementation=implementation, graph=graph, state=state, batch=batch, tokens=tokens
                )

    def _subjects(self) -> Iterator[tuple[Implementation, str, Sequence[str]]]:
        """Yield each implementation with its models and their types of states."""
        for model in self.models:
            yield "ours", model, self.states
        for model in self.others:
            yield "ours", model, self.states[:1]
        for peer in self.peers:
            yield "transformers", peer, [self.dtype]
        for model in self.models if self.loop else ():
            yield "mamba_ssm", model, [self.dtype]


def _subject(case: Case) -> tuple[str, str]:
    return case.implementation, case.model
