"""Plain torch operations, compared with a position-by-position recurrence in double precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels import dispatch, reference

LENGTHS = (1, 2, 7, 32, 33, 65)
CHUNK = 16


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scan position by position. Return the outputs [b, l, c] and the last state [b, c, k].

    Shapes: x and dt [b, l, c], A [c, k], B and C [b, l, c, k], D [c]; batch b, length l, channels c, state size k.
    """
    state, outputs = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1), state


def scan_inputs(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(length)
    b, c, k = 2, 6, 5
    inputs = {
        "x": torch.randn(b, length, c),
        "dt": torch.randn(b, length, c),
        "A": -torch.rand(c, k) * 4,
        "B": torch.randn(b, length, k),
        "C": torch.randn(b, length, k),
        "D": torch.randn(c),
        "z": torch.randn(b, length, c),
        "dt_bias": torch.randn(c),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def expected_scan(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    i = {name: tensor.double() for name, tensor in inputs.items()}
    B, C = (i[name][:, :, None].expand(-1, -1, i["A"].shape[0], -1) for name in "BC")
    y, state = recurrence(i["x"], F.softplus(i["dt"] + i["dt_bias"]), i["A"], B, C, i["D"])
    return y * F.silu(i["z"]), state


def ssd_inputs(length: int, groups: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(length)
    b, h, p, k = 2, 4, 3, 5
    inputs = {
        "x": torch.randn(b, length, h, p),
        "dt": torch.randn(b, length, h),
        "A": -torch.rand(h) * 4,
        "B": torch.randn(b, length, groups, k),
        "C": torch.randn(b, length, groups, k),
        "D": torch.randn(h),
        "dt_bias": torch.randn(h),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def expected_ssd(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    i = {name: tensor.double() for name, tensor in inputs.items()}
    (_, _, h, p), (groups, k) = i["x"].shape, i["B"].shape[2:]
    dt = F.softplus(i["dt"] + i["dt_bias"])
    A, D, dt = (
        i["A"].repeat_interleave(p)[:, None].expand(-1, k),
        i["D"].repeat_interleave(p),
        dt.repeat_interleave(p, 2),
    )
    B, C = (i[name].repeat_interleave(h * p // groups, 2) for name in "BC")
    y, state = recurrence(i["x"].flatten(2), dt, A, B, C, D)
    return y.unflatten(2, (h, p)), state.unflatten(1, (h, p))


def assert_same(inputs: dict[str, Tensor], found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Check that the outputs, the last states, and the gradients of all inputs are equal."""
    weights = [torch.randn_like(part.double()) for part in expected]
    gradients = []
    for parts in (found, expected):
        total = torch.stack([(part.double() * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum()
        gradients.append(torch.autograd.grad(total, list(inputs.values())))
    for part, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), oracle, rtol=2e-5, atol=2e-5)
    for name, part, oracle in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(part, oracle, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_selective_scan_and_its_gradients_equal_the_plain_recurrence(length: int) -> None:
    inputs = scan_inputs(length)
    assert_same(inputs, reference.selective_scan(**inputs), expected_scan(inputs))


def test_a_selective_scan_over_several_blocks_equals_the_plain_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCAN_BLOCK", 16)
    inputs = scan_inputs(50)
    assert_same(inputs, reference.selective_scan(**inputs), expected_scan(inputs))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_ssd_and_its_gradients_equal_the_plain_recurrence(length: int, groups: int) -> None:
    inputs = ssd_inputs(length, groups)
    assert_same(inputs, reference.ssd(**inputs, chunk_size=CHUNK), expected_ssd(inputs))


def test_strong_decay_gives_finite_outputs_states_and_gradients() -> None:
    """Log decays reach ±10^4 within a chunk, so exp overflows unless future positions are masked before it."""
    scan, duality = scan_inputs(33), ssd_inputs(33, 1)
    with torch.no_grad():
        for inputs in (scan, duality):
            inputs["A"].mul_(100)
            inputs["dt"].add_(5)
    for y, state in (reference.selective_scan(**scan), reference.ssd(**duality, chunk_size=CHUNK)):
        assert y.isfinite().all() and state.isfinite().all()
        y.sum().backward()
    assert all(
        tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (*scan.values(), *duality.values())
    )


def test_the_scans_compute_bf16_inputs_in_fp32() -> None:
    """The output must be the exact result for the bf16 inputs, rounded once to bf16."""
    scan, duality = scan_inputs(33, torch.bfloat16), ssd_inputs(33, 1, torch.bfloat16)
    for (y, state), (exact, exact_state) in (
        (reference.selective_scan(**scan), expected_scan(scan)),
        (reference.ssd(**duality, chunk_size=CHUNK), expected_ssd(duality)),
    ):
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
        torch.testing.assert_close(state.double(), exact_state, rtol=1e-4, atol=1e-4)


def test_stepping_position_by_position_equals_the_whole_selective_scan() -> None:
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(9).items()}
    y, last = reference.selective_scan(**inputs)
    state = torch.zeros_like(last)
    fixed = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    moving = {name: inputs[name] for name in ("x", "dt", "B", "C", "z")}
    steps = [
        reference.selective_scan_step(state, **{name: part[:, t] for name, part in moving.items()}, **fixed)
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_stepping_position_by_position_equals_the_whole_ssd(groups: int) -> None:
    inputs = {name: tensor.detach() for name, tensor in ssd_inputs(9, groups).items()}
    y, last = reference.ssd(**inputs, chunk_size=4)
    state = torch.zeros_like(last)
    fixed = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    moving = {name: inputs[name] for name in ("x", "dt", "B", "C")}
    steps = [
        reference.ssd_step(state, **{name: part[:, t] for name, part in moving.items()}, **fixed) for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_the_causal_convolution_equals_conv1d_and_single_steps_continue_it(length: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, length + 4, 6), torch.randn(6, 4), torch.randn(6)
    expected = F.silu(F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., : length + 4]).mT
    torch.testing.assert_close(reference.causal_conv(x, weight, bias), expected)

    state = dispatch.conv_state(x[:, :length], 4)
    steps = [reference.causal_conv_step(x[:, t], state, weight, bias) for t in range(length, length + 4)]
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, length:])


def test_gated_rms_norm_multiplies_by_the_gate_and_then_normalises_each_group() -> None:
    torch.manual_seed(0)
    x, z, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    gated = (x * F.silu(z)).unflatten(-1, (2, 4))
    expected = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    torch.testing.assert_close(reference.gated_rms_norm(x, z, weight, 1e-5, groups=2), expected)
