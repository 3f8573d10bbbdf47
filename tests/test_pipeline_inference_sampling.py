"""Choice of the next token: sampled frequencies, random numbers, and answers that do not depend on the batch."""

import pytest
import torch

from pipeline.inference.requests import Sampling
from pipeline.inference.sampling import choose, request_key, uniform
from pipeline.inference.text import TextStream
from tests.support.golden_tokenizer import gpt_neox

LOGITS = [0.3, 2.0, -1.0, 1.9, 0.0, -3.0, 1.0, 2.5, -0.5, 0.7]
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.0, top_k=99),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=2.0, top_k=6, top_p=0.7),
    Sampling(temperature=1.0, top_p=0.01),
]


def filtered_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """Compute the probability of every token by sorting and adding up plain numbers."""
    weights = {i: 2.718281828459045 ** (logit / sampling.temperature) for i, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])[: sampling.top_k or None]
    total, kept, below = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if below < sampling.top_p:
            kept.append(i)
        below += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampled_tokens_have_the_frequencies_of_the_filtered_distribution(sampling: Sampling) -> None:
    rows = 20_000
    keys = torch.tensor([request_key(sampling.seed, i) for i in range(rows)])
    tokens = choose(torch.tensor([LOGITS]).expand(rows, -1), sampling, keys, torch.full_like(keys, 3))
    expected = torch.tensor(filtered_distribution(LOGITS, sampling), dtype=torch.float64) * rows
    counts = tokens.bincount(minlength=len(LOGITS)).double()
    possible = expected > 0
    assert not counts[~possible].any()
    degrees = int(possible.sum()) - 1
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    assert chi_square <= degrees + 4 * (2 * degrees) ** 0.5  # the mean plus four standard deviations


def test_random_numbers_are_uniform_over_requests_positions_and_seeds() -> None:
    for keys, positions in (
        ([request_key(0, i) for i in range(4096)], [0] * 4096),
        ([request_key(0, 5)] * 4096, list(range(4096))),
        ([request_key(seed, 0) for seed in range(4096)], [7] * 4096),
    ):
        numbers = uniform(torch.tensor(keys), torch.tensor(positions)).double()
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = (numbers * 16).long().bincount(minlength=16).double()
        assert ((counts - 256).square() / 256).sum() < 15 + 4 * 30**0.5
        assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.06


def test_temperature_0_chooses_the_most_likely_token() -> None:
    keys = torch.zeros(1, dtype=torch.int64)
    assert choose(torch.tensor([LOGITS]), Sampling(), keys, keys).tolist() == [7]


@pytest.mark.parametrize("text", ["A café, naïve?", "  Größe 🙂🙂 \u4f60\u597d", "plain words\n\nand lines "])
def test_streamed_pieces_join_to_the_whole_text(text: str) -> None:
    tokenizer = gpt_neox()
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokenizer.encode(text))) == text.lstrip()


def test_streamed_text_ends_before_a_stop_string_that_spans_tokens() -> None:
    tokenizer = gpt_neox()
    for stop, expected, stopped in (((" naïve", "?"), "A café,", True), (("never", "naïve!"), "A café, naïve?", False)):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.add(token) for token in tokenizer.encode("A café, naïve?") if not stream.stopped]
        assert ("".join([*pieces, stream.end()]), stream.stopped) == (expected, stopped)
