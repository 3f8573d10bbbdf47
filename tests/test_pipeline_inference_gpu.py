"""The inference engine on a GPU: CUDA graphs and batches compared with plain PyTorch, one request at a time.

python -m pytest tests/test_pipeline_inference_gpu.py
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.kernels import dispatch
from model.weights import LoadedModel
from pipeline.inference.decoder import EagerDecoder, GraphDecoder
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.requests import Request, Sampling
from preprocess.prompts import Tokenizer, encode_prompt, load_tokenizer
from tests.support.tiny_data import write_byte_tokenizer
from tests.test_pipeline_inference import images, mixed_requests, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages and Triton call deprecated torch functions
]


@pytest.fixture(autouse=True, scope="module")
def exact_kernels() -> Iterator[None]:
    """Let Triton's kernels compute fp32 products exactly, because with tf32 the results would depend on the padding.

    Use one configuration of each kernel of mamba_ssm, because compiling and timing all of them takes minutes.
    """
    dispatch.fused()
    modules = [module for name, module in sys.modules.items() if name.startswith("mamba_ssm.ops.triton")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "tf32x3")
        for kernel in (value for module in modules for value in vars(module).values()):
            if hasattr(kernel, "configs") and hasattr(kernel, "fn"):
                patch.setattr(kernel, "configs", kernel.configs[-1:])
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=["tiny_v1", "tiny_v2"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return on_gpu(random_model(request.param))


def on_gpu(model: LoadedModel, dtype: torch.dtype = torch.float32) -> LoadedModel:
    device = torch.device("cuda")
    return replace(model, emma=model.emma.to(device, dtype), towers=model.towers.to(device, dtype), device=device)


def plain(model: LoadedModel, tokenizer: Tokenizer, **settings: Any) -> InferenceEngine:
    """Make an engine that completes one request at a time in plain PyTorch."""
    return InferenceEngine(model, tokenizer, max_batch=1, use_graphs=False, **settings)


def many_requests(engine: InferenceEngine) -> list[Request]:
    limits = (3, 40, 17, 64, 1, 30)
    return [
        replace(request, max_new_tokens=limits[i % 6] + 5 * (i // 6))
        for i, request in enumerate(mixed_requests(engine) * 4)
    ]


@pytest.mark.parametrize("max_batch", [1, 8])
def test_greedy_tokens_of_batches_with_graphs_equal_those_of_single_requests_in_fp32(
    model: LoadedModel, tokenizer: Tokenizer, max_batch: int
) -> None:
    """24 requests with and without images. The batch of 8 rows ends in a smaller decoder."""
    engine = InferenceEngine(model, tokenizer, max_batch=max_batch)
    requests = many_requests(engine)
    expected = plain(model, tokenizer).complete(requests)
    assert len({completion.text for completion in expected}) > 5
    for _ in range(3):  # the second run captures the prefill graphs, the third replays them
        assert engine.complete(requests) == expected
    assert isinstance(engine.decoders[max_batch], GraphDecoder)
    assert engine.prefill.graphs is not None and engine.prefill.graphs.captured


def test_rows_that_end_at_the_end_of_text_token_are_replaced_by_waiting_requests(tokenizer: Tokenizer) -> None:
    model = random_model("tiny_v2")
    model.emma.llm.backbone.embedding.weight[tokenizer.eos_id] *= 1.5
    engine = InferenceEngine(on_gpu(model), tokenizer, max_batch=4)
    requests = [replace(request, stop=("e", "%")) for request in many_requests(engine)]
    expected = plain(engine.model, tokenizer).complete(requests)
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}
    assert engine.complete(requests) == expected


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=3)],
    ids=str,
)
def test_sampled_tokens_of_batches_with_graphs_equal_those_of_single_requests(
    model: LoadedModel, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    engine = InferenceEngine(model, tokenizer, max_batch=8, sampling=sampling)
    requests = many_requests(engine)
    expected = plain(model, tokenizer, sampling=sampling).complete(requests)
    assert engine.complete(requests) == expected


def test_replayed_prefills_equal_the_prefill_of_one_row_without_padding(
    model: LoadedModel, tokenizer: Tokenizer
) -> None:
    engine, alone = InferenceEngine(model, tokenizer), plain(model, tokenizer)
    requests = mixed_requests(engine)
    for _ in range(3):
        logits, cache = engine.prefill(requests)
        for i, request in enumerate(requests):
            expected, states = alone.prefill([request])
            torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)
            for found, state in zip(cache, states, strict=True):
                torch.testing.assert_close(found.conv[i : i + 1], state.conv, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(found.ssm[i : i + 1], state.ssm, rtol=1e-3, atol=1e-3)
    assert engine.prefill.graphs is not None
    assert len(engine.prefill.graphs.captured) == 2  # the towers with the projector, and the language model


@pytest.mark.parametrize("with_image", [True, False])
def test_each_answer_of_a_dialogue_equals_the_answer_to_the_whole_prompt(
    model: LoadedModel, tokenizer: Tokenizer, with_image: bool
) -> None:
    engine, alone = InferenceEngine(model, tokenizer), plain(model, tokenizer)
    [image] = images(model, 1) if with_image else [None]
    dialogue = engine.dialogue(image)
    for question in ("Which colour?", "Are you sure?", "Why?"):
        answer = "".join(dialogue.ask(question, max_new_tokens=30))
        prompt = encode_prompt(dialogue.turns[:-1], model.config.template, tokenizer)
        [expected] = alone.complete([Request(prompt=prompt, image=image, max_new_tokens=30)])
        assert answer.strip() == expected.text


def test_log_likelihoods_with_graphs_equal_those_of_plain_pytorch(model: LoadedModel, tokenizer: Tokenizer) -> None:
    engine, alone = InferenceEngine(model, tokenizer), plain(model, tokenizer)
    continuations = [tokenizer.encode(text) for text in ("red", "a long answer", "no")]
    for request in mixed_requests(engine)[:2]:
        expected = alone.log_likelihoods(request, continuations)
        assert engine.log_likelihoods(request, continuations) == pytest.approx(expected, rel=1e-3)


def test_a_bf16_model_with_bf16_states_completes_every_request(tokenizer: Tokenizer) -> None:
    model = on_gpu(random_model("tiny_v2"), torch.bfloat16)
    engine = InferenceEngine(model, tokenizer, max_batch=8, state_dtype=torch.bfloat16)
    requests = many_requests(engine)
    for request, completion in zip(requests, engine.complete(requests), strict=True):
        assert completion.finish_reason == "stop" or len(completion.tokens) == request.max_new_tokens


def test_a_model_with_several_groups_is_decoded_in_plain_pytorch(tokenizer: Tokenizer) -> None:
    model = on_gpu(random_model("tiny_v2", num_groups=2))
    engine = InferenceEngine(model, tokenizer)
    assert engine.complete(mixed_requests(engine)) == plain(model, tokenizer).complete(mixed_requests(engine))
    assert isinstance(engine.decoders[8], EagerDecoder)
