"""Frozen vision towers, which compute the features of each patch from uint8 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from model.config import TowerConfig, VisionConfig
from model.errors import UserError, hub_error_text
from model.tensors import load_into, open_tensors

RANDOM_SEED = 20250  # fixed, because towers with random weights are not trained and must be equal in every run
# With timm's initialisation, features are small and nearly equal at all positions until a tower is trained. Random
# towers are never trained here, so their patch and position embeddings are drawn larger, as large as in trained towers.
RANDOM_PATCH_GAIN, RANDOM_POSITION_STD = 3.0, 1.5
HUB = "timm"


class Tower(nn.Module):
    """A timm vision transformer. Its features are the output of the second-to-last block, without the final norm.

    The last block, the final norm and the attention pool are not built, because the features do not depend on them.
    """

    def __init__(self, tower: TowerConfig, image_px: int) -> None:
        super().__init__()
        arguments = {**tower.overrides, "img_size": image_px, "depth": tower.num_blocks}
        self.vit = timm.create_model(tower.timm_name, num_classes=0, global_pool="", final_norm=False, **arguments)
        self.name = tower.name
        self.mean, self.std = tower.mean, tower.std  # not buffers, because `to` would round these to bf16

    def forward(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, height, width] -> [b, n, channels]
        """Return the features of every patch."""
        return self.vit.forward_features(self.normalise(pixels))[:, self.vit.num_prefix_tokens :]

    def patch_embedding(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, height, width] -> [b, n, channels]
        """Return the input of the first block for every patch, before the position embedding."""
        return self.vit.patch_embed(self.normalise(pixels))

    def description(self) -> dict[str, Any]:
        """Return the arguments of `ViT` in model/published/modeling_emma.py that build the same tower."""
        block = self.vit.blocks[0]
        return {
            "name": self.name,
            "width": self.vit.embed_dim,
            "num_blocks": len(self.vit.blocks),
            "num_heads": block.attn.num_heads,
            "d_mlp": block.mlp.fc1.out_features,
            "patch_px": self.vit.patch_embed.proj.kernel_size[0],
            "num_patches": self.vit.pos_embed.shape[1],
            "num_prefix_tokens": self.vit.num_prefix_tokens,
            "layer_scale": hasattr(block.ls1, "gamma"),
            "norm_eps": block.norm1.eps,
            "mean": self.mean,
            "std": self.std,
        }

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale uint8 pixels to [0, 1], and normalise them with the tower's mean and standard deviation."""
        mean, std = (_on_device(tuple(values), pixels.device)[:, None, None] for values in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).to(self.vit.patch_embed.proj.weight.dtype)


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy constants to a device once, because a CUDA graph cannot record a copy from the host's memory."""
    return torch.tensor(values, device=device)


class Towers(nn.Module):
    """Frozen towers that see the same image. Their features are concatenated.

    Args:
        config: Towers to build.
        pretrained: Origin of the weights: "timm" for timm's weights on the hub, or a folder that has a safetensors file
            or a hub snapshot for each tower, named after the tower or its timm name. None: random weights, the same in
            every run.

    Attributes:
        loaded: sha256 of each weight file that was loaded, by path.
    """

    towers: Mapping[str, Tower]

    def __init__(self, config: VisionConfig, pretrained: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.loaded: dict[str, str] = {}
        towers = _random_towers(config) if pretrained is None else _empty_towers(config)
        self.towers = nn.ModuleDict(towers)  # type: ignore[assignment]
        if pretrained is not None:
            for tower in config.towers:
                files = open_tensors(tower_file(tower, pretrained))
                tensors = published_tower(tower, files, config.grid)
                load_into(self.towers[tower.name].vit, tensors, source=f"{files.paths[0]} (tower {tower.name})")
                self.loaded |= files.file_hashes()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, height, width] -> [b, n, v]
        return torch.cat([tower(pixels) for tower in self.towers.values()], -1)

    @torch.no_grad()
    def patch_embedding(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, height, width] -> [b, n, channels]
        """Return the patch embedding of the last tower."""
        return self.towers[self.config.towers[-1].name].patch_embedding(pixels)

    def train(self, mode: bool = True) -> Towers:
        """Keep the towers in evaluation mode, because they are frozen."""
        return super().train(False)


@torch.no_grad()
def _random_towers(config: VisionConfig) -> dict[str, Tower]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        towers = {tower.name: Tower(tower, config.image_px) for tower in config.towers}
        for tower in towers.values():
            tower.vit.patch_embed.proj.weight *= RANDOM_PATCH_GAIN
            nn.init.normal_(tower.vit.pos_embed, std=RANDOM_POSITION_STD)
    return towers


def _empty_towers(config: VisionConfig) -> dict[str, Tower]:
    """Allocate towers without initialising them, since drawing random weights takes longer than loading weights."""
    with torch.device("meta"):
        towers = {tower.name: Tower(tower, config.image_px) for tower in config.towers}
    return {name: tower.to_empty(device="cpu") for name, tower in towers.items()}


def published_tower(tower: TowerConfig, tensors: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Drop the tensors that `Tower` does not build, and resample the position embedding to `grid` × `grid` patches."""
    unused = (f"blocks.{tower.num_blocks}.", "norm.", "fc_norm.", "attn_pool.", "head.")
    kept = {name: tensors[name] for name in tensors if not name.startswith(unused)}
    if "pos_embed" in kept:
        kept["pos_embed"] = resample_abs_pos_embed(kept["pos_embed"], [grid, grid], num_prefix_tokens=0)
    return kept


def tower_file(tower: TowerConfig, pretrained: str | Path, *, cached: bool = False) -> Path:
    """Return the path of a tower's weight file, in a folder or from the hub.

    Args:
        tower: Tower whose weights are wanted.
        pretrained: Folder of weight files, or "timm" for the hub.
        cached: Never download; use only files in the local hub cache.

    Raises: UserError if there is no such file.
    """
    if pretrained == HUB:
        return hub_file(tower, cached=cached)
    names = [f"{tower.name}.safetensors", f"{tower.timm_name}.safetensors", f"{tower.timm_name}/model.safetensors"]
    for path in (Path(pretrained) / name for name in names):
        if path.exists():
            return path
    raise UserError(f"{pretrained}: no weights of tower {tower.name}; expected one of {', '.join(names)}")


def hub_file(tower: TowerConfig, *, cached: bool = False) -> Path:
    """Return the path of a tower's published weight file. Download it if necessary, unless `cached` is set.

    Raises: UserError if the file is not in the local hub cache and is not or cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    repository = timm.get_pretrained_cfg(tower.timm_name).hf_hub_id
    try:
        return Path(hf_hub_download(repository, "model.safetensors", local_files_only=cached))
    except Exception as error:  # the hub client raises exceptions of many types
        raise UserError(
            f"tower {tower.name}: cannot download {repository} from the hub ({hub_error_text(error)}); "
            "download it on a machine with network access first: python -m pipeline.prefetch RECIPE"
        ) from error
