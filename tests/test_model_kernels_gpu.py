"""Triton kernels and CUDA graphs for decoding and prefill, compared with their references and with the model.

python -m pytest tests/test_model_kernels_gpu.py
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import MambaConfig
from model.kernels import decode_reference
from model.kernels.cuda_graph import CapturedFunction
from model.language_model import MambaLM
from model.presets import preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages and Triton call deprecated torch functions
]

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
EPS = 1e-5


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert found.shape == expected.shape and found.isfinite().all(), what
    distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert distance <= tolerance, f"{what}: relative distance {distance:.2e}, allowed {tolerance:.0e}"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that fails `assert_near` unless a kernel overwrites all its elements."""
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def partial_squares(x: Tensor) -> Tensor:
    return x.float().square().unflatten(1, (4, -1)).sum(2)


@pytest.fixture(params=[True, False], ids=["dependent", "serial"])
def pdl(request: pytest.FixtureRequest) -> bool:
    from model.kernels import decode

    if request.param and not decode.supports_dependent_launch(torch.device("cuda")):
        pytest.skip("dependent launch needs compute capability 9.0")
    return bool(request.param)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2600, 2560), (419, 96), (192, 5120), (1000, 328)])
def test_the_project_kernel_with_norm_and_convolution_equals_its_reference(
    shape: tuple[int, int], dtype: torch.dtype, batch: int, pdl: bool
) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    (n, k), start, channels = shape, 96, 70
    weight, x = normal(n, k, dtype=dtype) / k**0.5, normal(batch, k, dtype=dtype)
    state, conv_weight, bias = (
        normal(batch, channels, 3, dtype=dtype),
        normal(channels, 4, dtype=dtype),
        normal(channels),
    )
    sums, out = partial_squares(x), unwritten(batch, n, dtype=dtype)
    conv = decode.Conv(state.permute(2, 0, 1).contiguous(), conv_weight.t().contiguous(), bias, start)
    decode.project(weight, x, sums, EPS, out, conv, decode.tile_for(weight), pdl)
    expected = decode_reference.project_conv(weight, x, sums, EPS, state, conv_weight, bias, start)
    assert_near(out, expected, TOLERANCE[dtype], "out")
    assert_near(conv.state, state.permute(2, 0, 1), TOLERANCE[dtype], "state")
    plain = unwritten(batch, n, dtype=dtype)
    decode.project(weight, x, None, EPS, plain, None, decode.tile_for(weight), pdl)
    assert_near(plain, decode_reference.project(weight, x, None, EPS), TOLERANCE[dtype], "without norm")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2560, 5120), (96, 192)])
def test_the_project_residual_kernel_equals_its_reference(
    shape: tuple[int, int], dtype: torch.dtype, batch: int, pdl: bool
) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    n, k = shape
    weight, x, gain = normal(n, k, dtype=dtype) / k**0.5, normal(batch, k, dtype=dtype), normal(n, dtype=dtype)
    sums, residual, tile = partial_squares(x), normal(batch, n), decode.tile_for(weight)
    expected_residual = residual.clone()
    normed, out_sums = unwritten(batch, n, dtype=dtype), unwritten(batch, decode.num_programs(weight, tile))
    decode.project_residual(weight, x, sums, EPS, residual, gain, normed, out_sums, tile, pdl)
    expected, squares = decode_reference.project_residual(weight, x, sums, EPS, expected_residual, gain)
    assert_near(residual, expected_residual, TOLERANCE[dtype], "residual")
    assert_near(normed, expected, TOLERANCE[dtype], "normed")
    assert_near(out_sums.sum(1), squares, TOLERANCE[dtype], "squares")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vocabulary_and_argmax_kernels_equal_the_reference_and_torch_argmax(
    dtype: torch.dtype, batch: int, pdl: bool
) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    weight, x = normal(50283, 256, dtype=dtype), normal(batch, 256, dtype=dtype)
    tile, sums = decode.tile_for(weight), partial_squares(x)
    logits, value = unwritten(batch, 50283), unwritten(batch, decode.num_programs(weight, tile))
    index, tokens = torch.zeros_like(value, dtype=torch.int32), torch.zeros(batch, dtype=torch.int64, device="cuda")
    decode.project_vocabulary(weight, x, sums, EPS, logits, value, index, tile, pdl)
    decode.argmax(value, index, tokens, pdl)
    assert_near(logits, decode_reference.project(weight, x, sums, EPS), TOLERANCE[dtype])
    assert tokens.equal(logits.argmax(1))
    logits[:, 7] = logits[:, 50282] = logits.max() + 1
    decode.argmax(logits, None, tokens, pdl)
    assert tokens.tolist() == [7] * batch


@pytest.mark.parametrize("batch", [3, 16, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2600, 2560), (419, 96)])
def test_the_matmul_kernel_with_and_without_convolution_equals_its_reference(
    shape: tuple[int, int], dtype: torch.dtype, batch: int, pdl: bool
) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    (n, k), start, channels = shape, 96, 136
    weight, x = normal(n, k, dtype=dtype) / k**0.5, normal(batch, k, dtype=dtype)
    state, conv_weight, bias = (
        normal(batch, channels, 3, dtype=dtype),
        normal(channels, 4, dtype=dtype),
        normal(channels),
    )
    conv = decode.Conv(state.permute(2, 0, 1).contiguous(), conv_weight.t().contiguous(), bias, start)
    out = unwritten(1, batch, n, dtype=dtype)
    decode.matmul(weight, x, out, conv, decode.matmul_tile_for(weight, split=False), pdl)
    expected = decode_reference.project_conv(weight, x, None, EPS, state, conv_weight, bias, start)
    assert_near(out[0], expected, TOLERANCE[dtype], "out")
    assert_near(conv.state, state.permute(2, 0, 1), TOLERANCE[dtype], "state")
    tile = decode.matmul_tile_for(weight, split=True)
    parts = unwritten(tile.splits, batch, n)
    decode.matmul(weight, x, parts, None, tile, pdl)
    assert_near(parts.sum(0), decode_reference.project(weight, x, None, EPS), TOLERANCE[dtype], "parts")
    assert tile.splits == (5 if k == 2560 else 1)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mamba2_update_kernel_equals_its_reference(dtype: torch.dtype, state_dtype: torch.dtype, pdl: bool) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    batch, heads, head_dim, d_state = 5, 6, 64, 128
    channels = heads * head_dim
    zxbcdt = normal(batch, 2 * channels + 2 * d_state + heads, dtype=dtype)
    state = normal(batch, heads, head_dim, d_state, dtype=state_dtype)
    A, D, bias, gain = -normal(heads).exp(), normal(heads), 5 * normal(heads) - 5, normal(channels, dtype=dtype)
    y, sums = unwritten(batch, channels, dtype=dtype), unwritten(batch, channels // decode.mamba2_block(head_dim))
    exact = state.clone().float()
    decode.mamba2_update(zxbcdt, state, A, D, bias, gain, y, sums, pdl)
    expected, squares = decode_reference.mamba2_update(zxbcdt, exact, A, D, bias, gain)
    assert_near(y, expected, TOLERANCE[dtype], "y")
    assert_near(sums.sum(1), squares, 1e-5, "squares")
    assert_near(state, exact, 1e-6 if state_dtype == torch.float32 else 1e-2, "state")


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mamba1_update_kernel_equals_its_reference(
    dtype: torch.dtype, batch: int, low_rank: bool, pdl: bool
) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    channels, rank, d_state = 200, 24, 16
    xz, dbc = normal(batch, 2 * channels, dtype=dtype), normal(batch, rank + 2 * d_state, dtype=dtype)
    dt_weight, bias = normal(channels, rank, dtype=dtype) / rank**0.5, 5 * normal(channels) - 5
    state, A, D = normal(batch, channels, d_state), -normal(channels, d_state).exp(), normal(channels)
    exact, y = state.clone(), unwritten(batch, channels, dtype=dtype)
    dt = None if low_rank else (dbc[:, :rank].float() @ dt_weight.float().t())
    decode.mamba1_update(xz, dbc, dt, dt_weight, bias, A, D, state, y, pdl)
    assert_near(y, decode_reference.mamba1_update(xz, dbc, dt_weight, bias, A, D, exact), TOLERANCE[dtype], "y")
    assert_near(state, exact, 1e-5, "state")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embed_and_add_norm_kernels_equal_their_references(dtype: torch.dtype, pdl: bool) -> None:
    from model.kernels import decode

    torch.manual_seed(0)
    batch, width = 3, 2560
    table, gain, tokens = normal(100, width, dtype=dtype), normal(width, dtype=dtype), torch.tensor([5, 99, 0]).cuda()
    residual, normed, sums = unwritten(batch, width), unwritten(batch, width, dtype=dtype), unwritten(batch, 7)
    decode.embed(tokens, table, gain, residual, normed, sums, EPS)
    expected_residual, expected, squares = decode_reference.embed(tokens, table, gain)
    assert_near(residual, expected_residual, 1e-6)
    assert_near(normed, expected, TOLERANCE[dtype])
    assert_near(sums.sum(1), squares, 1e-5)
    decode.embed(tokens, table, gain, residual, normed, None, EPS)
    assert_near(normed, decode_reference.reference.rms_norm(expected_residual, gain, EPS), TOLERANCE[dtype])
    branch, branch_sums = normal(5, batch, width), normal(batch, 320).square()
    decode.add_norm(branch, branch_sums, 5120, EPS, residual, gain, normed, EPS, pdl)
    expected = decode_reference.add_norm(branch.sum(0), branch_sums, 5120, EPS, expected_residual, gain, EPS)
    assert_near(residual, expected_residual, 1e-5)
    assert_near(normed, expected, TOLERANCE[dtype])


def config(kind: str) -> MambaConfig:
    name = {"mamba1": "tiny_v1", "mamba2": "tiny_v2"}[kind]
    return replace(preset(name).llm, num_layers=4, vocab_size=96)


def language_model(kind: str, dtype: torch.dtype) -> MambaLM:
    torch.manual_seed(0)
    llm = MambaLM(config(kind))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return llm.to("cuda", dtype).requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_logits_of_a_captured_decode_step_equal_those_of_the_model(
    kind: str, dtype: torch.dtype, batch: int, pdl: bool
) -> None:
    from model.kernels.decode_graph import DecodeGraph

    llm, tokens = language_model(kind, dtype), torch.randint(96, (batch, 40), device="cuda")
    _, cache = llm.prefill(llm.embed(tokens[:, :10]))
    engine = DecodeGraph(llm, batch, dependent_launch=pdl)
    engine.load(cache)
    for t in range(10, 40):
        found, expected = engine.step(tokens[:, t]), llm.decode(tokens[:, t], cache)
        assert_near(found, expected, 1e-4 if dtype == torch.float32 else 4e-2, f"token {t}")
        assert engine.tokens.equal(found.argmax(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_greedy_tokens_of_the_decode_graph_equal_the_models_tokens_in_fp32(kind: str, batch: int) -> None:
    from model.kernels.decode_graph import DecodeGraph

    llm, prompt = language_model(kind, torch.float32), torch.randint(96, (batch, 10), device="cuda")
    logits, cache = llm.prefill(llm.embed(prompt))
    engine, token = DecodeGraph(llm, batch), logits.argmax(1)
    engine.load(cache)
    found: list[Any] = []
    expected: list[Any] = []
    for i in range(64):
        engine.step(token if i == 0 else None)
        found.append(engine.tokens.tolist())
        token = llm.decode(token, cache).argmax(1)
        expected.append(token.tolist())
    assert found == expected


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_logits_with_16_bit_states_stay_close_to_those_with_fp32_states(kind: str, state_dtype: torch.dtype) -> None:
    from model.kernels.decode_graph import DecodeGraph

    llm, tokens = language_model(kind, torch.bfloat16), torch.randint(96, (4, 200), device="cuda")
    _, cache = llm.prefill(llm.embed(tokens[:, :10]))
    exact, rounded = DecodeGraph(llm, 4), DecodeGraph(llm, 4, state_dtype=state_dtype)
    exact.load(cache)
    rounded.load(cache)
    for t in range(10, 200):
        assert_near(rounded.step(tokens[:, t]), exact.step(tokens[:, t]), 5e-2, f"token {t}")


def test_loading_a_new_state_into_one_row_of_a_decode_graph_gives_its_logits() -> None:
    from model.kernels.decode_graph import DecodeGraph

    llm, tokens = language_model("mamba2", torch.float32), torch.randint(96, (3, 30), device="cuda")
    engine = DecodeGraph(llm, 3)
    _, cache = llm.prefill(llm.embed(tokens[:, :10]))
    engine.load(cache)
    engine.step(tokens[:, 10])
    _, other = llm.prefill(llm.embed(tokens[1:2, :20]))
    engine.load(other, slice(1, 2))
    found = engine.step(tokens[:, 20])
    assert_near(found[1:2], llm.decode(tokens[1:2, 20], other), 1e-4)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_logits_and_states_of_a_captured_prefill_equal_those_of_the_model(kind: str) -> None:
    llm = language_model(kind, torch.float32)
    graph = CapturedFunction(llm.prefill, torch.zeros(2, 50, llm.config.d_model, device="cuda"))
    for seed in range(2):
        x = llm.embed(torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(seed)).cuda())
        logits, cache = graph(x)
        expected, own = llm.prefill(x)
        assert_near(logits, expected, 1e-4)
        for found, oracle in zip(cache, own, strict=True):
            assert_near(found.conv, oracle.conv, 1e-4)
            assert_near(found.ssm, oracle.ssm, 1e-4)
