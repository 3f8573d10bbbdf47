"""The frozen vision towers of the ablation, which all runs share. They are trained once, on images of their own.

Each tower learns to name the shapes, characters and colours in each patch, and to reconstruct the pixels of the patch.
Published towers know their images in a similar way: SigLIP was trained to match texts, DINOv2 to match parts of images.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.ablation.configs import Size
from benchmarks.ablation.data import Split
from benchmarks.ablation.scenes import LABELS
from model.alignment import patchify
from model.hashing import file_sha256
from model.vision import Tower, Towers
from preprocess.atomic import write_json

HELD_OUT = 512  # images at the end of the split that measure the towers instead of training them
LR, POSITIVE_WEIGHT = 1e-3, 5.0


def ensure_towers(folder: Path, size: Size, data: Split, device: torch.device) -> str:
    """Train the towers, unless they are there. Return the sha256 of their file."""
    path = folder / "towers.safetensors"
    if not path.exists():
        began = time.monotonic()
        towers, quality = _train(size, data, device)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in towers.state_dict().items()}, path)
        write_json(folder / "towers.json", {**quality, "seconds": round(time.monotonic() - began, 1)})
    return file_sha256(path)


def load_towers(folder: Path, size: Size, device: torch.device) -> Towers:
    towers = Towers(size.vision)
    towers.load_state_dict(load_file(folder / "towers.safetensors"))
    return towers.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _train(size: Size, data: Split, device: torch.device) -> tuple[Towers, dict[str, float]]:
    torch.manual_seed(0)
    vision = size.vision
    towers = nn.ModuleDict({tower.name: Tower(tower, vision.image_px) for tower in vision.towers}).to(device)
    num_values = 3 * vision.patch_px**2
    heads = nn.ModuleDict({tower.name: nn.Linear(tower.width, len(LABELS) + num_values) for tower in vision.towers})
    heads.to(device)
    optimizer = torch.optim.AdamW([*towers.parameters(), *heads.parameters()], LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=size.tower_steps + 1, pct_start=0.1)
    count = max(len(data.images) - HELD_OUT, len(data.images) // 2)
    rng = np.random.default_rng(0)
    for _ in range(size.tower_steps):
        rows = np.sort(rng.choice(count, size.tower_batch, replace=False))
        losses = _losses(towers, heads, size, data, rows, device)
        optimizer.zero_grad()
        torch.stack([naming + pixels for naming, pixels, _ in losses]).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = _losses(towers, heads, size, data, np.arange(count, len(data.images)), device)
    trained = Towers(vision)
    trained.load_state_dict({f"towers.{name}": tensor for name, tensor in towers.state_dict().items()})
    quality: dict[str, float] = {}
    for name, (_, pixels, f1) in zip(towers, losses, strict=True):
        quality |= {f"{name}/f1": round(float(f1), 4), f"{name}/pixel_error": round(float(pixels), 4)}
    return trained, quality


def _losses(
    towers: nn.ModuleDict, heads: nn.ModuleDict, size: Size, data: Split, rows: np.ndarray, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each tower the loss of the names, the squared error of the pixels, and the F1 score of the names."""
    pixels = torch.from_numpy(data.images[rows]).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.labels[rows]).to(device).float()  # [b, n, labels]
    values = patchify(size.vision, pixels.float() / 255 - 0.5)
    weight = torch.full((len(LABELS),), POSITIVE_WEIGHT, device=device)
    losses = []
    for name, tower in towers.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            named, redrawn = heads[name](tower(pixels)).float().split([len(LABELS), values.shape[-1]], -1)
        naming = F.binary_cross_entropy_with_logits(named, labels, pos_weight=weight)
        right = ((named > 0) * labels).sum()
        f1 = 2 * right / ((named > 0).sum() + labels.sum()).clamp(min=1)
        losses.append((10 * naming, (redrawn - values).square().mean(), f1))
    return losses


def describe(folder: Path) -> dict[str, float]:
    """Return the quality of the trained towers on held-out images."""
    return json.loads((folder / "towers.json").read_text())
