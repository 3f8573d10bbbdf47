"""Pixel-wise alignment (EMMA Eq. 6, 9): a small decoder predicts the image from the states of its visual tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EmmaConfig, VisionConfig
from model.fusion import FUSIONS
from model.language_model import MambaStack
from model.vision import Towers

TARGET_EPS = 1e-6


class AlignTarget(NamedTuple):
    """Target of the decoder: values normalised per patch, and the mean and standard deviation that undo this."""

    values: Tensor  # [b, n, values] fp32
    mean: Tensor  # [b, n, 1]
    std: Tensor  # [b, n, 1]


class Alignment(nn.Module):
    """Fuse the tapped states, and decode them with Mamba blocks, a norm and a linear layer."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        assert config.alignment is not None
        self.shift = config.alignment.shift
        self.fusion = FUSIONS[config.alignment.fusion](config)
        mamba = config.mamba_blocks(config.alignment.decoder_kind, config.alignment.decoder_width)
        same_width = mamba.d_model == config.llm.d_model
        self.narrow = nn.Identity() if same_width else nn.Linear(config.llm.d_model, mamba.d_model)
        self.decoder = MambaStack(replace(mamba, num_layers=config.alignment.decoder_layers))
        self.out = nn.Linear(mamba.d_model, config.alignment.num_values)

    def forward(self, levels: tuple[Tensor, ...], target: Tensor) -> Tensor:  # -> [b] fp32
        """Return the squared error of each image, averaged over its patches and values."""
        return (self.predict(levels).float() - target).square().mean((1, 2))

    def predict(self, levels: tuple[Tensor, ...]) -> Tensor:  # shallow to final, [b, n, d] each -> [b, n, values]
        """Predict the values of each patch from the states of this patch and earlier patches.

        With `shift` 1, the state of the patch itself is left out.
        """
        levels = tuple(F.pad(level, (0, 0, self.shift, 0))[:, : level.shape[1]] for level in levels)
        return self.decode(self.fusion(levels))

    def decode(self, fused: Tensor) -> Tensor:  # [b, n, d] -> [b, n, values]
        """Predict the values of each patch from the fused states."""
        return self.out(self.decoder(self.narrow(fused))[0])


@torch.no_grad()
def align_target(config: EmmaConfig, towers: Towers, pixels: Tensor, features: Tensor) -> AlignTarget:
    """Compute the target of the decoder from pixels (uint8 [b, 3, height, width]) and features ([b, n, v]).

    Differs from the paper, where the target is raw pixels: the values are normalised per patch, as in the paper's
    published code.
    """
    assert config.alignment is not None
    match config.alignment.target:
        case "pixels":
            values = patchify(config.vision, pixels.float() / 255)
        case "features":
            values = features.float()
        case "patch_embedding":
            values = towers.patch_embedding(pixels).float()
    mean = values.mean(-1, keepdim=True)
    centred = values - mean
    variance = centred.square().sum(-1, keepdim=True) / (values.shape[-1] - 1)
    std = (variance + TARGET_EPS).sqrt()
    return AlignTarget(centred / std, mean, std)


def patchify(vision: VisionConfig, pixels: Tensor) -> Tensor:  # [b, 3, height, width] -> [b, n, values]
    """Cut images into the patches that the towers see, in raster order.

    Each patch becomes `patch_px * patch_px * 3` values, in the order of rows, columns, channels.
    """
    seen = pixels[:, :, : vision.seen_px, : vision.seen_px]
    grid, side = vision.grid, vision.patch_px
    return seen.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(vision: VisionConfig, values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Invert `patchify` and the normalisation. Return images, uint8 [b, 3, seen_px, seen_px]."""
    grid, side = vision.grid, vision.patch_px
    patches = (values.float() * std + mean).unflatten(2, (side, side, 3)).unflatten(1, (grid, grid))
    image = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
