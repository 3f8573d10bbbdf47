"""Mamba-1 scan on a GPU, forward and backward, compared with the plain reference and with mamba_ssm.

python -m pytest tests/test_model_kernels_scan_gpu.py
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels import reference
from model.kernels.mamba1.scan import scan_backward, scan_forward
from model.mamba import Mamba1Mixer
from model.presets import preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages call deprecated torch functions
]

RANK, CHANNELS, STATES = 8, 256, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # bf16 rounds the results to 8 bits


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape and found.isfinite().all(), what
    distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert distance <= tolerance, f"{what}: relative distance {distance:.1e}, allowed {tolerance:.0e}"


def inputs(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random inputs of the scan, where dt, B, C and z are slices of larger tensors, as in the mixer."""
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    B, C = normal(2, length, RANK + 2 * STATES).to(dtype)[..., RANK:].chunk(2, -1)
    return {
        "x": normal(2, length, CHANNELS).to(dtype),
        "dt": (normal(2, length, CHANNELS) - 1).to(dtype),
        "z": normal(2, length, 2 * CHANNELS).to(dtype).chunk(2, -1)[1],
        "B": B,
        "C": C,
        "A": -8 * normal(CHANNELS, STATES).abs(),
        "D": normal(CHANNELS),
        "dt_bias": normal(CHANNELS),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 261])
def test_the_scan_and_all_its_gradients_equal_the_reference(length, dtype):
    given = inputs(length, dtype)
    out, states, last_state = scan_forward(**given)
    grad = torch.randn_like(out)
    grad_z = torch.empty(2, length, 2 * CHANNELS, dtype=dtype, device="cuda")[..., CHANNELS:]
    scan = scan_backward(grad, states, grad_z, **given)

    leaves = {name: value.detach().float().requires_grad_() for name, value in given.items()}
    expected, expected_state = reference.selective_scan(**leaves)
    expected.backward(grad.float())
    tolerance = TOLERANCE[dtype]
    assert_near(last_state, expected_state, 1e-5, "last state")
    assert_near(out, expected, tolerance, "output")
    assert_near(scan.out, expected, tolerance, "output recomputed in the backward pass")
    B, C = scan.BC.chunk(2, -1)
    found = {**scan._asdict(), "B": B, "C": C}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert_near(found[name], leaf.grad, tolerance, f"gradient of {name}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_the_mixer_has_the_outputs_and_gradients_of_mamba_ssm(dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    config = replace(preset("emma_v1").llm, d_model=256)
    mixer = Mamba1Mixer(config).to("cuda", dtype)
    x, grad = torch.randn(2, 3, 100, config.d_model, dtype=dtype, device="cuda")
    results = {}
    for scan in ("own", "mamba_ssm"):
        monkeypatch.setenv("EMMA_MAMBA1_SCAN", scan)
        mixer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = mixer(leaf)
        out.backward(grad)
        assert ("Mamba1Inner" in type(out.grad_fn).__name__) == (scan == "own")
        gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
        results[scan] = {"out": out.detach(), "x": leaf.grad, **gradients}
    for name, expected in results["mamba_ssm"].items():
        assert_near(results["own"][name], expected, tolerance, name)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_the_prefill_with_left_padding_equals_the_prefill_on_the_cpu(dtype, tolerance, padding):
    torch.manual_seed(0)
    config = replace(preset("emma_v1").llm, d_model=256)
    mixer = Mamba1Mixer(config).to("cuda", dtype)
    x, mask = torch.randn(3, 101, config.d_model, dtype=dtype, device="cuda"), None
    if padding:
        mask = (torch.arange(101, device="cuda") >= padding).to(dtype)[None, :, None].expand(3, -1, -1)
        x = x * mask
    with torch.inference_mode():
        found, state = mixer.prefill(x, mask)
    expected, expected_state = mixer.to("cpu", torch.float32).prefill(x[:, padding:].cpu().float())
    assert_near(found[:, padding:].cpu(), expected, tolerance, "output")
    assert_near(state.conv.cpu(), expected_state.conv, tolerance, "state of the convolution")
    assert_near(state.ssm.cpu(), expected_state.ssm, tolerance, "state of the scan")
