"""The inference engine on a CPU: batches of different lengths, continuous batching, sampling, and dialogues."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.emma import Emma
from model.mamba import Cache, State
from model.presets import preset
from model.vision import Towers
from model.weights import LoadedModel
from pipeline.inference import scheduler
from pipeline.inference.decoder import EagerDecoder
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.requests import Completion, Request, Sampling
from preprocess.prompts import Tokenizer, encode_prompt, load_tokenizer
from tests.support.tiny_data import write_byte_tokenizer

QUESTIONS = ["Which?", "A rather long question, is it not?", "Why?", "What is the name of it?", "x", "Which colour?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=["tiny_v1", "tiny_v2"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return random_model(request.param)


def random_model(name: str, **changes: Any) -> LoadedModel:
    """Build a small model that prefers printable characters. Noise in every parameter makes its answers differ."""
    config = preset(name)
    config = replace(config, alignment=None, llm=replace(config.llm, num_layers=3, vocab_size=258, **changes))
    torch.manual_seed(0)
    emma = Emma(config).requires_grad_(False).eval()
    for parameter in emma.llm.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    emma.llm.backbone.embedding.weight[96:] *= 0.1  # ids 2 to 95 are the printable characters of ASCII
    device = torch.device("cpu")
    return LoadedModel(config=config, emma=emma, towers=Towers(config.vision), tokenizer=None, extra={}, device=device)


def images(model: LoadedModel, count: int) -> list[np.ndarray]:
    px = model.config.vision.image_px
    return list(np.random.default_rng(0).integers(0, 256, (count, px, px, 3), np.uint8))


def mixed_requests(engine: InferenceEngine) -> list[Request]:
    """Make requests of different lengths and limits, every other one with an image."""
    pixels = [image if i % 2 else None for i, image in enumerate(images(engine.model, len(QUESTIONS)))]
    pairs = zip(QUESTIONS, pixels, strict=True)
    return [engine.request(text, image, max_new_tokens=4 + 7 * (i % 3)) for i, (text, image) in enumerate(pairs)]


# -- Padding -----------------------------------------------------------------------------------------------------------


def test_teacher_forced_logits_of_a_padded_batch_equal_those_of_its_rows(
    model: LoadedModel, tokenizer: Tokenizer
) -> None:
    engine, llm = InferenceEngine(model, tokenizer), model.emma.llm
    requests, prefill = mixed_requests(engine), engine.prefill
    forced = torch.randint(0, 256, (len(requests), 24), generator=torch.Generator().manual_seed(1))
    assert len({prefill.length(request) for request in requests}) == len(requests)
    logits, cache = prefill(requests)
    found = [logits] + [llm.decode(column, cache) for column in forced.unbind(1)]
    for i, request in enumerate(requests):
        expected = teacher_forced(model, request, forced[i])
        torch.testing.assert_close(torch.stack(found, 1)[i], expected, rtol=1e-4, atol=1e-4)


def teacher_forced(model: LoadedModel, request: Request, forced: Tensor) -> Tensor:
    """Compute the logits of one row by the training forward pass, which knows neither padding nor states."""
    features = None if request.image is None else model.towers(torch.from_numpy(request.image).permute(2, 0, 1)[None])
    tokens = torch.tensor([[*request.prompt, *forced.tolist()]])
    hidden, _ = model.emma.llm(torch.cat(model.emma.embed(tokens, features), 1))
    return model.emma.llm.head(hidden[0, -len(forced) - 1 :])


def test_values_at_padding_positions_do_not_affect_the_results(model: LoadedModel) -> None:
    llm = model.emma.llm
    x = torch.randn(2, 30, llm.config.d_model, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(30) >= torch.tensor([[0], [11]])
    noisy = torch.where(mask[..., None], x, 100.0)
    logits, cache = llm.prefill(noisy, mask)
    expected, states = llm.prefill(x[1:, 11:])
    torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-4)
    assert_equal_states([State(*(part[1:] for part in state)) for state in cache], states)


def assert_equal_states(found: Cache, expected: Cache) -> None:
    for pair in zip(found, expected, strict=True):
        for part, oracle in zip(*pair, strict=True):
            torch.testing.assert_close(part, oracle, rtol=1e-4, atol=1e-4)


# -- Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_batch", "lag"), [(1, 0), (2, 2), (3, 0), (8, 2), (64, 0)])
def test_completions_do_not_depend_on_the_batch_size(
    model: LoadedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, max_batch: int, lag: int
) -> None:
    """With a lag, as on a GPU, tokens are read after later steps have been launched."""
    monkeypatch.setitem(scheduler.LAG, "cpu", lag)
    alone = InferenceEngine(model, tokenizer)
    requests = mixed_requests(alone) * 2
    expected = [alone.complete([request])[0] for request in requests]
    assert len({completion.text for completion in expected}) > 3
    assert InferenceEngine(model, tokenizer, max_batch=max_batch).complete(requests) == expected


def test_greedy_tokens_equal_those_of_recomputing_the_whole_sequence(model: LoadedModel, tokenizer: Tokenizer) -> None:
    engine = InferenceEngine(model, tokenizer)
    for request, completion in zip(mixed_requests(engine), engine.complete(mixed_requests(engine)), strict=True):
        forced = torch.tensor([*completion.tokens, tokenizer.eos_id][: request.max_new_tokens])
        assert teacher_forced(model, request, forced)[:-1].argmax(-1).equal(forced)


@pytest.mark.parametrize("lag", [0, 2])
def test_completions_end_at_the_end_of_text_token_and_free_their_place(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Give the end-of-text token a large logit at times, so that the rows end at different steps."""
    monkeypatch.setitem(scheduler.LAG, "cpu", lag)
    model = random_model("tiny_v2")
    model.emma.llm.backbone.embedding.weight[tokenizer.eos_id] *= 1.5
    engine = InferenceEngine(model, tokenizer, max_batch=2)
    requests = [replace(request, max_new_tokens=25) for request in mixed_requests(engine)] * 2
    completions = engine.complete(requests)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    assert len({len(completion.tokens) for completion in completions}) > 2
    assert all(tokenizer.eos_id not in completion.tokens for completion in completions)
    assert completions == [engine.complete([request])[0] for request in requests]


def test_requests_are_read_only_when_there_is_room_for_them(tokenizer: Tokenizer) -> None:
    engine, read = InferenceEngine(random_model("tiny_v2"), tokenizer, max_batch=2), []

    def stream() -> Iterator[Request]:
        for i in range(7):
            read.append(i)
            yield engine.request(f"Question {i}?", max_new_tokens=3 + i)

    for done, _ in enumerate(engine.run(stream()), 1):
        assert len(read) <= done + 2
    assert len(read) == 7


def test_no_requests_give_no_completions(model: LoadedModel, tokenizer: Tokenizer) -> None:
    assert InferenceEngine(model, tokenizer).complete([]) == []


def test_a_stop_string_ends_the_completion_before_the_string(model: LoadedModel, tokenizer: Tokenizer) -> None:
    engine = InferenceEngine(model, tokenizer)
    [whole] = engine.complete([engine.request("Which?", max_new_tokens=40)])
    stop = whole.text[2:4]
    request = replace(engine.request("Which?", max_new_tokens=40), stop=("never said", stop))
    [found] = engine.complete([request])
    at = whole.text.index(stop)
    assert (found.text, found.finish_reason) == (whole.text[:at].strip(), "stop")
    assert len(found.tokens) < len(whole.tokens)


def test_16_bit_states_give_similar_logits(model: LoadedModel, tokenizer: Tokenizer) -> None:
    decoders = [InferenceEngine(model, tokenizer, state_dtype=t)._decoder(2) for t in (torch.float32, torch.bfloat16)]
    for step in range(20):
        exact, rounded = (decoder.step(torch.tensor([step, 2 * step + 1])) for decoder in decoders)
        assert not torch.equal(exact, rounded) or step == 0
        assert (exact - rounded).norm() < 0.05 * exact.norm()


# -- Log-likelihoods ---------------------------------------------------------------------------------------------------


def test_log_likelihoods_equal_those_of_the_training_forward_pass(model: LoadedModel, tokenizer: Tokenizer) -> None:
    engine = InferenceEngine(model, tokenizer, max_batch=2)
    continuations = [tokenizer.encode(text) for text in ("red", "a long answer", "")]
    for request in mixed_requests(engine)[:2]:
        found = engine.log_likelihoods(request, continuations)
        for value, tokens in zip(found, continuations, strict=True):
            logits = teacher_forced(model, request, torch.tensor(tokens, dtype=torch.int64))[:-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None]).sum()
            assert value == pytest.approx(float(expected), abs=1e-3)


# -- Dialogues ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("limit", [5, 40])
def test_the_state_of_a_dialogue_equals_the_state_after_its_whole_prompt(
    model: LoadedModel, tokenizer: Tokenizer, with_image: bool, limit: int
) -> None:
    engine = InferenceEngine(model, tokenizer)
    [image] = images(model, 1) if with_image else [None]
    dialogue = engine.dialogue(image)
    for question in ("Which colour?", "Are you sure?", "Why?"):
        answer = "".join(dialogue.ask(question, max_new_tokens=limit))
        assert answer.strip() == dialogue.turns[-1]["value"]
        prompt = encode_prompt(dialogue.turns[:-1], model.config.template, tokenizer)
        assert dialogue.saved[0][0] == prompt
        _, states = engine.prefill([Request(prompt=prompt, image=image)])
        assert_equal_states(dialogue.saved[0][1], states)
        [alone] = engine.complete([Request(prompt=prompt, image=image, max_new_tokens=limit)])
        assert dialogue.turns[-1]["value"] == alone.text


def test_a_second_question_costs_its_own_tokens_only(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = InferenceEngine(random_model("tiny_v2"), tokenizer)
    steps: list[Tensor | None] = []
    step = EagerDecoder.step

    def record(self: EagerDecoder, tokens: Tensor | None = None) -> Tensor:
        steps.append(tokens)
        return step(self, tokens)

    monkeypatch.setattr(EagerDecoder, "step", record)
    dialogue = engine.dialogue()
    answer = "".join(dialogue.ask("What do you see in this image?", max_new_tokens=6))
    assert (len(answer), len(steps)) == (6, 5)
    list(dialogue.ask("Why?", max_new_tokens=1))
    first = engine.request("What do you see in this image?").prompt
    prompt = encode_prompt(dialogue.turns[:-1], engine.model.config.template, tokenizer)
    assert [int(tokens) for tokens in steps[5:] if tokens is not None] == prompt[
        len(first) + 5 :
    ]  # the steps have read 5 tokens of the answer


def test_a_dialogue_continues_after_an_answer_whose_iterator_was_closed_early(
    model: LoadedModel, tokenizer: Tokenizer
) -> None:
    engine = InferenceEngine(model, tokenizer)
    dialogue = engine.dialogue()
    answer = dialogue.ask("What do you see?")
    seen = next(answer) + next(answer)
    answer.close()
    assert dialogue.turns[-1]["value"].startswith(seen)
    found = "".join(dialogue.ask("Why?", max_new_tokens=9)).strip()
    prompt = encode_prompt(dialogue.turns[:-1], model.config.template, tokenizer)
    assert found == engine.complete([Request(prompt=prompt, max_new_tokens=9)])[0].text


# -- Sampling ----------------------------------------------------------------------------------------------------------


def test_sampled_completions_depend_on_the_seed_but_not_on_the_batch_size(
    model: LoadedModel, tokenizer: Tokenizer
) -> None:
    def complete(seed: int, max_batch: int) -> list[Completion]:
        sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=seed)
        engine = InferenceEngine(model, tokenizer, max_batch=max_batch, sampling=sampling)
        return engine.complete(mixed_requests(engine))

    expected = complete(0, 1)
    assert [complete(0, max_batch) for max_batch in (2, 64)] == [expected, expected]
    assert complete(1, 64) != expected
