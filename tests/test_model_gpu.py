"""Models on the fused GPU kernels, compared with the model of mamba_ssm and with plain torch on the CPU.

The tests need a GPU and the installed kernels:

    python -m pytest tests/test_model_gpu.py
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.alignment import align_target
from model.config import MambaConfig
from model.emma import Emma
from model.kernels.dispatch import kernel_report
from model.language_model import MambaLM
from model.presets import PRESETS, preset
from model.vision import Towers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages and Triton call deprecated torch functions
]

KINDS = ("mamba1", "mamba2")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 7, 64, 100, 129)  # the SSD chunk size is 64
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # Triton multiplies fp32 matrices in tf32


def config(kind: str) -> MambaConfig:
    name = {"mamba1": "tiny_v1", "mamba2": "tiny_v2"}[kind]
    return replace(preset(name).llm, num_layers=4, vocab_size=96, chunk_size=64)


def language_model(kind: str, dtype: torch.dtype = torch.float32) -> MambaLM:
    torch.manual_seed(0)
    llm = MambaLM(config(kind))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return llm.to("cuda", dtype)


def mamba_ssm_twin(llm: MambaLM, dtype: torch.dtype) -> Any:
    from mamba_ssm.models.config_mamba import MambaConfig as PublishedConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    own = llm.config
    ssm: dict[str, Any] = {"d_state": own.d_state, "d_conv": own.d_conv, "expand": own.expand}
    if own.kind == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": own.head_dim, "ngroups": own.num_groups, "chunk_size": own.chunk_size}
    published = PublishedConfig(
        d_model=own.d_model, n_layer=own.num_layers, vocab_size=own.vocab_size, ssm_cfg=ssm, pad_vocab_size_multiple=8
    )
    twin = MambaLMHeadModel(published, device="cuda")
    twin.load_state_dict(llm.state_dict(), strict=True)
    return twin.to(dtype)


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Compare relative norms, because single elements of a bf16 tensor may differ by more than their own value."""
    assert found.shape == expected.shape and found.isfinite().all(), what
    distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert distance <= tolerance, f"{what}: relative distance {distance:.2e}, allowed {tolerance:.0e}"


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(length)).cuda()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    if tokens.shape[1] == 1:
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_those_of_mamba_ssms_own_model(
    kind: str, dtype: torch.dtype, length: int
) -> None:
    """Bits may differ although both models run the same kernels, because Mamba-1's backward sums in no fixed order."""
    llm, tokens = language_model(kind, dtype), tokens_of(length)
    twin = mamba_ssm_twin(llm, dtype)
    logits, expected = llm.head(llm(llm.embed(tokens))[0]), twin(tokens).logits
    assert_near(logits, expected, 1e-5 if dtype == torch.float32 else 1e-2, "logits")
    loss, expected_loss = loss_of(logits, tokens), loss_of(expected, tokens)
    assert_near(loss, expected_loss, 1e-5 if dtype == torch.float32 else 1e-2, "loss")
    loss.backward()
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in llm.named_parameters():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, gradients.pop(name), 1e-4 if dtype == torch.float32 else 1e-2, name)
    assert not gradients


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_with_kernels_equal_those_of_plain_torch_on_the_cpu(kind: str, length: int) -> None:
    llm, tokens = language_model(kind), tokens_of(length)
    twin = MambaLM(llm.config)
    twin.load_state_dict(llm.state_dict())
    logits = llm.head(llm(llm.embed(tokens))[0])
    expected = twin.head(twin(twin.embed(tokens.cpu()))[0])
    assert_near(logits.cpu(), expected, TOLERANCE[torch.float32], "logits")
    loss_of(logits, tokens).backward()
    loss_of(expected, tokens.cpu()).backward()
    for (name, parameter), oracle in zip(llm.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and oracle.grad is not None
        assert_near(parameter.grad.cpu(), oracle.grad, 1e-2, name)


@pytest.mark.parametrize("prompt", [1, 2, 3, 64, 101])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_equal_the_full_forward_pass(kind: str, dtype: torch.dtype, prompt: int) -> None:
    llm, tokens = language_model(kind, dtype).requires_grad_(False), tokens_of(prompt + 8, rows=3)
    expected = llm.head(llm(llm.embed(tokens))[0])
    logits, cache = llm.prefill(llm.embed(tokens[:, :prompt]))
    assert_near(logits, expected[:, prompt - 1], TOLERANCE[dtype], "prefill")
    before = [part.data_ptr() for state in cache for part in state]
    for t in range(prompt, prompt + 8):
        assert_near(llm.decode(tokens[:, t], cache), expected[:, t], TOLERANCE[dtype], f"token {t}")
    assert [part.data_ptr() for state in cache for part in state] == before


@pytest.mark.parametrize("policy", [(1, 0), (2, 0), (3, 1), (4, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_does_not_change_gradients(
    kind: str, dtype: torch.dtype, policy: tuple[int, int]
) -> None:
    llm, tokens = language_model(kind, dtype), tokens_of(100)

    def gradients() -> tuple[Tensor, ...]:
        final, tapped = llm(llm.embed(tokens), (0, 2))
        loss = loss_of(llm.head(final), tokens) + sum(level.float().square().mean() for level in tapped)
        return torch.autograd.grad(loss, list(llm.parameters()))

    expected = gradients()
    llm.segment_layers, llm.keep_layers = policy
    for (name, _), found, oracle in zip(llm.named_parameters(), gradients(), expected, strict=True):
        assert_near(found, oracle, 1e-4 if dtype == torch.float32 else 1e-2, name)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny_")])
def test_losses_and_gradients_of_every_tiny_preset_equal_those_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    emma, towers = Emma(preset(name)), Towers(preset(name).vision)
    pixels = torch.randint(0, 256, (2, 3, 100, 100), dtype=torch.uint8)
    features, tokens = towers(pixels), torch.randint(0, 1024, (2, 30))
    target = align_target(emma.config, towers, pixels, features).values if emma.config.alignment else None
    assert_near(towers.cuda()(pixels.cuda()).cpu(), features, 1e-3, "features")

    twin = Emma(emma.config)
    twin.load_state_dict(emma.state_dict())
    outcomes = []
    for model, device in ((twin, "cpu"), (emma, "cuda")):
        model.to(device)
        inputs = [part if part is None else part.to(device) for part in (tokens, tokens, features, target)]
        losses = model(*inputs)
        total = losses.text_nll.sum() + (0 if losses.align_error is None else losses.align_error.sum())
        total.backward()
        outcomes.append(total.cpu())
    assert_near(outcomes[1], outcomes[0], 1e-3, "loss")
    for (parameter_name, parameter), oracle in zip(emma.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and oracle.grad is not None, parameter_name
        assert_near(parameter.grad.cpu(), oracle.grad, 2e-2, parameter_name)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_fp32_parameters_get_finite_fp32_gradients(kind: str) -> None:
    llm, tokens = language_model(kind), tokens_of(100)
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(llm.head(llm(llm.embed(tokens))[0]), tokens)
    loss.backward()
    exact = loss_of(llm.head(llm(llm.embed(tokens))[0]), tokens)
    assert_near(loss, exact, 2e-2, "loss")
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in llm.parameters()
    )


def test_the_kernel_report_names_the_kernel_packages_and_the_gpu() -> None:
    report = kernel_report("cuda")
    assert "mamba_ssm 2." in report and "causal_conv1d 1." in report and torch.cuda.get_device_name() in report
