"""Pixel-wise alignment: targets, decoder and loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.alignment import Alignment, align_target, unpatchify
from model.config import AlignmentConfig, EmmaConfig
from model.presets import preset
from model.vision import Towers

CONFIG = preset("tiny_v2")
PIXELS = torch.randint(0, 256, (2, 3, 100, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def alignment_of(config: EmmaConfig) -> AlignmentConfig:
    assert config.alignment is not None
    return config.alignment


def with_alignment(config: EmmaConfig, **changes: Any) -> EmmaConfig:
    return replace(config, alignment=replace(alignment_of(config), **changes))


def states(num: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 49, CONFIG.llm.d_model) for _ in range(num))


def target(config: EmmaConfig) -> tuple[Tensor, Tensor, Tensor]:
    towers = Towers(config.vision)
    return align_target(config, towers, PIXELS, towers(PIXELS))


def test_unpatchify_restores_the_exact_pixels_that_the_vision_towers_received() -> None:
    values, mean, std = target(CONFIG)
    assert values.shape == (2, 49, 588)
    assert torch.equal(unpatchify(CONFIG.vision, values, mean, std), PIXELS[:, :, :98, :98])


def test_pixel_targets_are_in_raster_order_and_normalised_per_patch() -> None:
    values, mean, std = target(CONFIG)
    patch = PIXELS[1, :, 14:28, 42:56].permute(1, 2, 0).flatten() / 255  # row 1, column 3
    torch.testing.assert_close(mean[1, 7 + 3, 0], patch.mean())
    torch.testing.assert_close(std[1, 7 + 3, 0], (patch.var() + 1e-6).sqrt())
    torch.testing.assert_close(
        values[1, 7 + 3], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt(), rtol=1e-4, atol=1e-5
    )


def test_pixel_targets_of_single_coloured_patches_are_finite() -> None:
    towers = Towers(CONFIG.vision)
    flat = torch.full_like(PIXELS, 128)
    values, mean, std = align_target(CONFIG, towers, flat, towers(flat))
    assert values.isfinite().all() and values.abs().max() < 1e-2
    assert torch.equal(unpatchify(CONFIG.vision, values, mean, std), flat[:, :, :98, :98])


@pytest.mark.parametrize(("name", "width"), [("tiny_avf", 160), ("tiny_release", 64)])
def test_feature_and_patch_embedding_targets_are_normalised_per_patch(name: str, width: int) -> None:
    config = preset(name)
    towers = Towers(config.vision)
    features = towers(PIXELS)
    values, mean, std = align_target(config, towers, PIXELS, features)
    raw = features if name == "tiny_avf" else towers.patch_embedding(PIXELS)
    assert values.shape == (2, 49, width) and not values.requires_grad
    torch.testing.assert_close(values * std + mean, raw, rtol=1e-4, atol=1e-5)


def test_the_alignment_decoder_applies_mamba_blocks_a_norm_and_a_linear_layer() -> None:
    alignment, levels = Alignment(CONFIG), states()
    x = alignment.fusion(levels)
    for layer in alignment.decoder.layers:
        x = x + layer.mixer(layer.norm(x)[0])
    expected = alignment.out(alignment.decoder.norm_f(x)[0])
    assert len(alignment.decoder.layers) == 2
    torch.testing.assert_close(alignment.predict(levels), expected, rtol=1e-4, atol=1e-5)


def test_the_alignment_loss_is_the_fp32_mean_squared_error_per_image() -> None:
    alignment, levels, (values, *_) = Alignment(CONFIG).bfloat16(), states(), target(CONFIG)
    rounded = tuple(level.bfloat16() for level in levels)
    error = alignment(rounded, values)
    predicted = alignment.predict(rounded)
    assert (predicted.dtype, error.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(error, ((predicted.float() - values) ** 2).sum((1, 2)) / (49 * 588))


@pytest.mark.parametrize("fusion", ["cascade", "none"])
@pytest.mark.parametrize("shift", [0, 1])
def test_only_predictions_from_patch_index_plus_shift_onwards_depend_on_a_patch(shift: int, fusion: str) -> None:
    taps = alignment_of(CONFIG).taps if fusion == "cascade" else ()
    alignment = Alignment(with_alignment(CONFIG, shift=shift, fusion=fusion, taps=taps))
    before = states(len(taps) + 1)
    changed = tuple(level.clone() for level in before)
    for level in changed:
        level[:, 20] += 1
    differs = (alignment.predict(before) != alignment.predict(changed)).any(-1)
    assert not differs[:, : 20 + shift].any() and differs[:, 20 + shift :].all()


def test_the_alignment_decoder_can_have_its_own_width_and_mamba_kind() -> None:
    alignment = Alignment(with_alignment(CONFIG, decoder_width=64, decoder_kind="mamba1"))
    assert {layer.mixer.config.kind for layer in alignment.decoder.layers} == {"mamba1"}
    assert alignment.out.in_features == 64
    assert alignment.predict(states()).shape == (2, 49, 588)


def test_full_size_presets_use_the_alignment_weight_of_the_published_code() -> None:
    """The paper's published code multiplies each squared error by 1e-5. Our weights multiply means over 729 patches."""
    weights = {name: alignment_of(preset(name)).weight for name in ("emma_v1", "avf", "release")}
    assert weights == pytest.approx({"emma_v1": 4.28652, "avf": 15.86304, "release": 8.39808})
