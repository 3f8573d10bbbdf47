"""Vision towers, compared with intermediate layers of the complete timm models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from model.config import TowerConfig
from model.errors import UserError
from model.presets import preset
from model.vision import Towers

VISION = preset("tiny_v2").vision
PIXELS = torch.randint(0, 256, (2, 3, 100, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def published(tower: TowerConfig, image_px: int) -> Any:
    """Build the complete timm model with random weights: all blocks, all norms, and SigLIP's attention pool."""
    torch.manual_seed(1)
    model = timm.create_model(tower.timm_name, num_classes=0, **{**tower.overrides, "img_size": image_px}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_published(folder: Path, image_px: int = 100) -> list[Any]:
    models = [published(tower, image_px) for tower in VISION.towers]
    for tower, model in zip(VISION.towers, models, strict=True):
        save_file(model.state_dict(), folder / f"{tower.name}.safetensors")
    return models


def second_to_last(tower: TowerConfig, model: Any, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    normalised = (pixels / 255 - mean) / std
    with torch.no_grad():
        return model.get_intermediate_layers(normalised, n={tower.depth - 2}, norm=False)[0]


def test_features_concatenate_the_second_to_last_layers_of_timms_models(tmp_path: Path) -> None:
    models = save_published(tmp_path)
    features = Towers(VISION, tmp_path)(PIXELS)
    expected = [second_to_last(*pair, PIXELS) for pair in zip(VISION.towers, models, strict=True)]
    assert features.shape == (2, 49, 160)
    torch.testing.assert_close(features, torch.cat(expected, -1), rtol=1e-4, atol=1e-5)


def test_position_embeddings_of_another_resolution_are_resampled_as_timm_does(tmp_path: Path) -> None:
    """The published DINOv2 has 37 × 37 patches, but our towers have fewer."""
    published_models = save_published(tmp_path, image_px=14 * 11)
    towers = Towers(VISION, tmp_path)
    for tower, larger in zip(VISION.towers, published_models, strict=True):
        smaller = published(tower, 100)
        smaller.load_state_dict(checkpoint_filter_fn(larger.state_dict(), smaller))
        assert larger.pos_embed.shape[1] == 121 and smaller.pos_embed.shape[1] == 49
        expected = second_to_last(tower, smaller, PIXELS)
        torch.testing.assert_close(towers.towers[tower.name](PIXELS), expected, rtol=1e-4, atol=1e-5)


def test_pixels_beyond_the_last_whole_patch_do_not_change_features() -> None:
    towers, changed = Towers(VISION), PIXELS.clone()
    changed[:, :, VISION.seen_px :] = 0
    changed[:, :, :, VISION.seen_px :] = 0
    assert torch.equal(towers(PIXELS), towers(changed))


def test_full_size_towers_omit_the_layers_after_their_second_to_last_block() -> None:
    with torch.device("meta"):
        towers = Towers(preset("emma_v2").vision)
        whole = [timm.create_model(tower.timm_name, num_classes=0, img_size=384) for tower in towers.config.towers]
    assert (_count(towers), sum(map(_count, whole))) == (688_860_448, 731_940_928)
    assert [len(tower.vit.blocks) for tower in towers.towers.values()] == [23, 26]
    assert towers.config.num_patches == 729 and towers.config.width == 2176
    left_out = {name for model in whole for name, _ in model.named_parameters()} - {
        name.split(".vit.")[1] for name, _ in towers.named_parameters()
    }
    assert {name.split(".")[0] for name in left_out} == {"norm", "attn_pool", "blocks"}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_random_towers_do_not_depend_on_the_global_seed_and_do_not_advance_it() -> None:
    torch.manual_seed(1)
    first = Towers(VISION)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(2)
    for one, other in zip(first.parameters(), Towers(VISION).parameters(), strict=True):
        assert torch.equal(one, other)


def test_towers_are_frozen_and_stay_in_evaluation_mode() -> None:
    towers = nn.Sequential(Towers(VISION)).train()[0]
    assert not any(module.training for module in towers.modules())
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    assert not towers(PIXELS).requires_grad


def test_bf16_towers_give_features_within_one_percent_of_fp32_towers() -> None:
    exact, rounded = Towers(VISION), Towers(VISION).bfloat16()
    features = rounded(PIXELS)
    assert features.dtype == torch.bfloat16
    assert (features - exact(PIXELS)).norm() / exact(PIXELS).norm() < 0.01


def test_patch_embedding_returns_the_patch_embedding_of_the_last_tower() -> None:
    towers = Towers(VISION)
    proj = towers.towers["siglip"].vit.patch_embed.proj
    expected = nn.functional.conv2d((PIXELS / 255 - 0.5) / 0.5, proj.weight, proj.bias, stride=14).flatten(2).mT
    torch.testing.assert_close(towers.patch_embedding(PIXELS), expected, rtol=1e-4, atol=1e-5)


def test_the_error_for_a_folder_without_weights_lists_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights of tower dinov2; expected one of dinov2\.safetensors"):
        Towers(VISION, tmp_path)


def test_the_error_for_weights_of_another_size_lists_each_differing_tensor(tmp_path: Path) -> None:
    save_published(tmp_path)
    wider = replace(VISION.towers[1], overrides={**VISION.towers[1].overrides, "embed_dim": 32})
    with pytest.raises(UserError, match=r"tower siglip.*blocks\.0\.norm1\.weight is \[64\], expected \[32\]"):
        Towers(replace(VISION, towers=(VISION.towers[0], wider)), tmp_path)
