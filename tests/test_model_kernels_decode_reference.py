"""Reference operations of the fused decode step, compared with the decode step of the model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels import decode_reference as fused
from model.language_model import MambaLM
from model.mamba import Mamba1Mixer, Mamba2Mixer, State
from model.presets import preset

EPS = 1e-5


def mix(mixer: torch.nn.Module, normed: Tensor, sums: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """Return the input of `out_proj` and, for Mamba-2, the sums of squares for the norm before it."""
    assert isinstance(mixer, Mamba1Mixer | Mamba2Mixer)
    start = 0 if isinstance(mixer, Mamba1Mixer) else mixer.config.d_inner
    projected = fused.project_conv(mixer.in_proj.weight, normed, sums, EPS, state.conv, *mixer.conv_parameters, start)
    A, D = mixer.decay_rates, mixer.D
    if isinstance(mixer, Mamba2Mixer):
        y, total = fused.mamba2_update(projected, state.ssm, A, D, mixer.dt_bias, mixer.norm.weight)
        return y, total[:, None]
    dbc = fused.project(mixer.x_proj.weight, projected[:, : mixer.config.d_inner], None, EPS)
    dt = mixer.dt_proj
    return fused.mamba1_update(projected, dbc, dt.weight, dt.bias, A, D, state.ssm), None


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v2"])
def test_the_reference_operations_together_equal_the_models_decode_step(name: str) -> None:
    torch.manual_seed(0)
    llm = MambaLM(replace(preset(name).llm, num_layers=3)).requires_grad_(False)
    for parameter in llm.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(1024, (2, 9))
    _, cache = llm.prefill(llm.embed(tokens[:, :8]))
    own = [State(conv.clone(), ssm.clone()) for conv, ssm in cache]
    expected = llm.decode(tokens[:, 8], cache)

    layers = list(llm.backbone.layers)
    norms = [layer.norm.weight for layer in layers[1:]] + [llm.backbone.norm_f.weight]
    residual, normed, total = fused.embed(tokens[:, 8], llm.backbone.embedding.weight, layers[0].norm.weight)
    for layer, norm, state in zip(layers, norms, own, strict=True):
        y, sums = mix(layer.mixer, normed, total[:, None], state)
        normed, total = fused.project_residual(layer.mixer.out_proj.weight, y, sums, EPS, residual, norm)
    found = fused.project(llm.lm_head.weight, normed, total[:, None], EPS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for state, moved in zip(own, cache, strict=True):
        torch.testing.assert_close(state.conv, moved.conv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.ssm, moved.ssm, rtol=1e-4, atol=1e-4)
