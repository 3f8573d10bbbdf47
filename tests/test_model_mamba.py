"""Mamba language models, compared with the transformers implementations with the same weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mamba2ForCausalLM, MambaForCausalLM

from model.config import MambaConfig, MambaKind
from model.language_model import MambaLM, plan_segments
from model.mamba import NO_WEIGHT_DECAY, Mixer
from model.presets import preset
from model.transformers_layout import TokenIds, transformers_config

KINDS: tuple[MambaKind, ...] = ("mamba1", "mamba2")
LENGTHS = (1, 7, 33, 64, 65)


def small(kind: MambaKind, **changes: Any) -> MambaConfig:
    config = MambaConfig(
        kind=kind,
        d_model=64,
        num_layers=3,
        vocab_size=96,
        d_state={"mamba1": 8, "mamba2": 32}[kind],
        head_dim=32,
        chunk_size=32,
    )
    return replace(config, **changes)


def language_model(kind: MambaKind, **changes: Any) -> MambaLM:
    """Build a language model. Add noise to every parameter, because some are initialised to a constant."""
    torch.manual_seed(0)
    llm = MambaLM(small(kind, **changes))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return llm


def transformers_twin(llm: MambaLM) -> Any:
    twins = {"mamba1": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
    twin_class = twins[llm.config.kind]
    twin = twin_class(twin_class.config_class(**transformers_config(llm.config, TokenIds()), use_cache=False))
    state = {theirs(name): tensor for name, tensor in llm.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.train()


def theirs(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the next-token loss. In a sequence of one token, the token itself is the target."""
    if tokens.shape[1] == 1:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_those_of_the_transformers_model(kind: MambaKind, length: int) -> None:
    llm = language_model(kind)
    twin = transformers_twin(llm)
    tokens = torch.randint(0, 96, (2, length))
    logits = llm.head(llm(llm.embed(tokens))[0])
    expected = twin(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    loss, expected_loss = next_token_loss(logits, tokens), next_token_loss(expected, tokens)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in llm.named_parameters():
        oracle = gradients.pop(theirs(name))
        torch.testing.assert_close(parameter.grad, oracle, rtol=1e-3, atol=2e-5, msg=name)
    assert not gradients


@pytest.mark.parametrize("groups", [2, 4])
def test_logits_of_mamba2_with_several_groups_equal_those_of_transformers(groups: int) -> None:
    llm = language_model("mamba2", num_groups=groups, head_dim=16)
    tokens = torch.randint(0, 96, (2, 40))
    y = llm.backbone.layers[0].mixer.prefill(llm.embed(tokens))[1].ssm
    assert y.shape == (2, 8, 16, llm.config.d_state)
    twin = transformers_twin(llm)
    for layer in twin.backbone.layers:  # the norm in transformers treats all channels as one group
        layer.mixer.norm.forward = _group_norm(layer.mixer.norm, groups)
    torch.testing.assert_close(llm.head(llm(llm.embed(tokens))[0]), twin(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def _group_norm(norm: Any, groups: int) -> Any:
    def forward(hidden: Tensor, gate: Tensor) -> Tensor:
        gated = (hidden * F.silu(gate)).unflatten(-1, (groups, -1))
        return norm.weight * (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)

    return forward


@pytest.mark.parametrize("prompt", [1, 2, 3, 31, 32, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_equal_the_full_forward_pass(kind: MambaKind, prompt: int) -> None:
    llm = language_model(kind).requires_grad_(False)
    tokens = torch.randint(0, 96, (3, prompt + 6))
    expected = llm.head(llm(llm.embed(tokens))[0])
    logits, cache = llm.prefill(llm.embed(tokens[:, :prompt]))
    torch.testing.assert_close(logits, expected[:, prompt - 1], rtol=1e-4, atol=1e-4)
    for t in range(prompt, prompt + 6):
        torch.testing.assert_close(llm.decode(tokens[:, t], cache), expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_rows_with_padding_on_the_left_equal_those_of_transformers(kind: MambaKind) -> None:
    llm = language_model(kind).requires_grad_(False)
    tokens, padding = torch.randint(0, 96, (4, 45)), torch.tensor([[0], [7], [13], [44]])
    mask = torch.arange(45) >= padding
    found, _ = llm.prefill(llm.embed(tokens), mask)
    expected = transformers_twin(llm)(input_ids=tokens, attention_mask=mask.long()).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_updates_the_cache_in_place_without_changing_its_size(kind: MambaKind) -> None:
    llm = language_model(kind).requires_grad_(False)
    _, cache = llm.prefill(llm.embed(torch.randint(0, 96, (1, 5))))
    before = [(part.data_ptr(), part.shape) for state in cache for part in state]
    llm.decode(torch.tensor([3]), cache)
    assert [(part.data_ptr(), part.shape) for state in cache for part in state] == before


# (layers, taps, segment_layers, keep_layers) -> segments as (start, stop, recomputed)
PLANS = [
    ((8, (), 0, 0), [(0, 8, False)], "no checkpointing, no taps"),
    ((8, (3, 4), 0, 0), [(0, 4, False), (4, 5, False), (5, 8, False)], "taps end segments even without checkpointing"),
    ((8, (), 1, 0), [(i, i + 1, True) for i in range(8)], "every layer"),
    ((8, (3,), 3, 0), [(0, 3, True), (3, 4, True), (4, 7, True), (7, 8, True)], "segments restart at a tap"),
    ((8, (3,), 4, 2), [(0, 4, True), (4, 6, True), (6, 8, False)], "the last two keep their activations"),
    (
        (8, (6,), 4, 3),
        [(0, 4, True), (4, 5, True), (5, 7, False), (7, 8, False)],
        "a tap in a layer that keeps its activations",
    ),
    ((8, (), 4, 8), [(0, 8, False)], "all keep their activations"),
    ((8, (), 4, 99), [(0, 8, False)], "keep_layers exceeds the number of layers"),
    ((0, (), 4, 0), [], "no layers"),
]


@pytest.mark.parametrize(("arguments", "expected", "why"), PLANS, ids=[why for *_, why in PLANS])
def test_checkpointing_segments_end_at_taps_and_have_at_most_segment_layers_layers(
    arguments: tuple, expected: list, why: str
) -> None:
    num_layers, taps, segment_layers, keep_layers = arguments
    segments = plan_segments(num_layers, taps, segment_layers=segment_layers, keep_layers=keep_layers)
    assert [tuple(segment) for segment in segments] == expected, why


@pytest.mark.parametrize("tap", ["mixer", "residual"])
@pytest.mark.parametrize("policy", [(1, 0), (2, 0), (3, 1), (4, 0), (4, 3), (8, 0), (2, 8)])
def test_activation_checkpointing_does_not_change_gradients_through_taps(policy: tuple[int, int], tap: str) -> None:
    llm = language_model("mamba2", num_layers=6)
    tokens = torch.randint(0, 96, (2, 20))
    expected = _tapped_gradients(llm, tokens, tap)
    llm.segment_layers, llm.keep_layers = policy
    for found, oracle in zip(_tapped_gradients(llm, tokens, tap), expected, strict=True):
        assert torch.equal(found, oracle)


def _tapped_gradients(llm: MambaLM, tokens: Tensor, tap: str) -> list[Tensor]:
    final, tapped = llm(llm.embed(tokens), (1, 3), tap)
    assert len(tapped) == 2
    loss = llm.head(final).square().mean() + sum(level.sin().mean() for level in tapped)
    return list(torch.autograd.grad(loss, list(llm.parameters())))


def test_a_tap_returns_the_mixer_output_or_the_residual_stream_after_its_layer() -> None:
    llm = language_model("mamba1")
    x = torch.randn(2, 9, 64)
    hidden, residual = x, None
    branches, streams = [], []
    for layer in llm.backbone.layers:
        hidden, residual = layer(hidden, residual)
        branches.append(hidden)
        streams.append(hidden + residual)
    for tap, expected in (("mixer", branches), ("residual", streams)):
        final, tapped = llm(x, (0, 2), tap)
        torch.testing.assert_close(tapped, (expected[0], expected[2]))
    stream = streams[-1]
    norm = llm.backbone.norm_f
    oracle = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    torch.testing.assert_close(final, oracle)


@pytest.mark.parametrize("kind", KINDS)
def test_changing_later_inputs_does_not_change_earlier_outputs(kind: MambaKind) -> None:
    llm = language_model(kind)
    x = torch.randn(1, 40, 64)
    changed = x.clone()
    changed[:, 25:] += 1
    before, after = llm(x)[0], llm(changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.isclose(before[:, 25:], after[:, 25:]).all(-1).any()


@pytest.mark.parametrize(("name", "count"), [("emma_v1", 2_768_345_600), ("emma_v2", 2_702_599_680)])
def test_full_size_language_models_have_the_published_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        llm = MambaLM(preset(name).llm)
    assert sum(parameter.numel() for parameter in llm.parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
def test_to_empty_keeps_weights_tied_and_their_no_weight_decay_marks(kind: MambaKind) -> None:
    with torch.device("meta"):
        llm = MambaLM(small(kind))
    llm = llm.to_empty(device="cpu")
    assert llm.lm_head.weight is llm.backbone.embedding.weight
    marked = {name.rpartition(".")[2] for name, p in llm.named_parameters() if getattr(p, "_no_weight_decay", False)}
    own = {
        name for mixer in llm.modules() if isinstance(mixer, Mixer) for name, _ in mixer.named_parameters(recurse=False)
    }
    assert marked == own == set(NO_WEIGHT_DECAY) - ({"dt_bias"} if kind == "mamba1" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_have_the_ranges_of_mamba_ssms_initialisation(kind: MambaKind) -> None:
    torch.manual_seed(0)
    llm = MambaLM(small(kind, d_model=256, num_layers=4))
    mixer: Any = llm.backbone.layers[1].mixer
    bias = mixer.dt_proj.bias if kind == "mamba1" else mixer.dt_bias
    steps, A = F.softplus(bias), mixer.decay_rates
    assert steps.min() >= 0.001 and steps.max() <= 0.1 and steps.log().std() > 0.5
    if kind == "mamba1":
        torch.testing.assert_close(A, -torch.arange(1.0, 9).expand(512, -1))
        assert mixer.dt_proj.weight.abs().max() <= mixer.config.dt_rank**-0.5
    else:
        assert A.min() >= -16 and A.max() <= -1
    bound = (
        1 / mixer.out_proj.in_features
    ) ** 0.5 / 4**0.5  # the initialisation divides by the square root of the number of layers
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(llm.backbone.embedding.weight.std() - 0.02) < 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_stream_stays_fp32_with_bf16_weights(kind: MambaKind) -> None:
    llm = language_model(kind).bfloat16()
    hidden, residual = llm.backbone.layers[0](llm.embed(torch.randint(0, 96, (1, 8))))
    assert (hidden.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    exact = language_model(kind)
    tokens = torch.randint(0, 96, (2, 50))
    rounded, oracle = llm.head(llm(llm.embed(tokens))[0]).float(), exact.head(exact(exact.embed(tokens))[0])
    assert (rounded - oracle).norm() / oracle.norm() < 0.03
