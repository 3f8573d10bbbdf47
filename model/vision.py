"""The frozen vision towers: uint8 pixels to concatenated patch features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from model.config import TowerConfig, VisionConfig
from model.errors import UserError, first_line
from model.tensors import fill, open_tensors

RANDOM_SEED = 20250  # of towers without published weights: they are frozen, so every run must draw the same ones
# timm's random vision transformers hardly tell places apart, and their features are weak. That is right as a start for
# training, but these stay as they are; trained ones have both.
RANDOM_PATCH_GAIN, RANDOM_POSITION_STD = 3.0, 1.5
HUB = "timm"


class Tower(nn.Module):
    """A timm vision transformer up to its second-to-last block, without the final norm.

    The last block, the final norm and the attention pool never reach the output, so they are not built.
    """

    def __init__(self, tower: TowerConfig, image_px: int) -> None:
        super().__init__()
        arguments = {**tower.overrides, "img_size": image_px, "depth": tower.num_blocks}
        self.vit = timm.create_model(tower.timm_name, num_classes=0, global_pool="", final_norm=False, **arguments)
        self.mean, self.std = tower.mean, tower.std  # no buffers: they would be rounded with the weights

    def forward(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, h, w] -> [b, n, width]
        return self.vit.forward_features(self.normalise(pixels))[:, self.vit.num_prefix_tokens :]

    def patch_embedding(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, h, w] -> [b, n, width]
        return self.vit.patch_embed(self.normalise(pixels))

    @torch.no_grad()
    def strengthen(self) -> None:
        """Random weights that frozen towers can do with."""
        self.vit.patch_embed.proj.weight *= RANDOM_PATCH_GAIN
        nn.init.normal_(self.vit.pos_embed, std=RANDOM_POSITION_STD)

    def normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).to(self.vit.patch_embed.proj.weight.dtype)


class Towers(nn.Module):
    """Frozen towers that see the same picture; their features are concatenated in the config's order.

    pretrained   None: random, the same for everybody; "timm": timm's hub; else a folder with one safetensors file per
                 tower, named after the tower or its timm name (or a hub snapshot of that name)
    loaded       path -> sha256 of the files that were read
    """

    towers: Mapping[str, Tower]

    def __init__(self, config: VisionConfig, pretrained: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.loaded: dict[str, str] = {}
        towers = _random_towers(config) if pretrained is None else _empty_towers(config)
        self.towers = nn.ModuleDict(towers)  # type: ignore[assignment]
        if pretrained is not None:
            for described in config.towers:
                self._load(described, pretrained)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, h, w] -> [b, n, v]
        return torch.cat([tower(pixels) for tower in self.towers.values()], -1)

    @torch.no_grad()
    def patch_embedding(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, h, w] -> [b, n, width of the last tower]
        return self.towers[self.config.towers[-1].name].patch_embedding(pixels)

    def train(self, mode: bool = True) -> Towers:
        """Frozen: always in evaluation mode."""
        return super().train(False)

    def _load(self, tower: TowerConfig, pretrained: str | Path) -> None:
        files = open_tensors(tower_file(tower, pretrained))
        vit = self.towers[tower.name].vit
        fill(vit, published_tower(tower, files, self.config.grid), f"{files.paths[0]} (tower {tower.name})")
        self.loaded |= files.record()


def _random_towers(config: VisionConfig) -> dict[str, Tower]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        towers = {tower.name: Tower(tower, config.image_px) for tower in config.towers}
        for tower in towers.values():
            tower.strengthen()
    return towers


def _empty_towers(config: VisionConfig) -> dict[str, Tower]:
    """With memory, but without values: to draw them takes longer than to read the ones that replace them."""
    with torch.device("meta"):
        towers = {tower.name: Tower(tower, config.image_px) for tower in config.towers}
    return {name: tower.to_empty(device="cpu") for name, tower in towers.items()}


def published_tower(tower: TowerConfig, tensors: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """A published checkpoint without what is never built, its position embedding resampled to `grid` × `grid`."""
    unused = (f"blocks.{tower.num_blocks}.", "norm.", "fc_norm.", "attn_pool.", "head.")
    kept = {name: tensors[name] for name in tensors if not name.startswith(unused)}
    if "pos_embed" in kept:
        kept["pos_embed"] = resample_abs_pos_embed(kept["pos_embed"], [grid, grid], num_prefix_tokens=0)
    return kept


def tower_file(tower: TowerConfig, pretrained: str | Path, cached: bool = False) -> Path:
    """Where a tower's weights are: in the folder `pretrained`, or the hub's. `cached`: nothing is downloaded."""
    return hub_file(tower, cached) if pretrained == HUB else _local_file(tower, Path(pretrained))


def _local_file(tower: TowerConfig, folder: Path) -> Path:
    names = [f"{tower.name}.safetensors", f"{tower.timm_name}.safetensors", f"{tower.timm_name}/model.safetensors"]
    for path in (folder / name for name in names):
        if path.exists():
            return path
    raise UserError(f"{folder}: no weights of tower {tower.name}; expected one of {', '.join(names)}")


def hub_file(tower: TowerConfig, cached: bool = False) -> Path:
    """A tower's published weights, downloaded unless they are in the hub's cache already, or must be: `cached`."""
    from huggingface_hub import hf_hub_download

    repository = timm.get_pretrained_cfg(tower.timm_name).hf_hub_id
    try:
        return Path(hf_hub_download(repository, "model.safetensors", local_files_only=cached))
    except Exception as error:  # the hub client raises a dozen types; to the user they are one
        raise UserError(
            f"tower {tower.name}: cannot get {repository} from the hub ({first_line(error)}); "
            "download it on a machine with network first: python -m pipeline.prefetch RECIPE"
        ) from error
