"""Parameters, FLOPs and bytes per parameter of a model, computed from its config on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from model.config import EmmaConfig, MambaConfig, TowerConfig, VisionConfig
from model.emma import Emma
from model.vision import Towers

GIB = 1 << 30  # bytes
MULTIPLY_ADD = 2
CHECKPOINT_BYTES = 12  # per trainable parameter: fp32 master weight and Adam's two moments
STATE_BYTES = {
    "bf16": 18,
    "autocast": 16,
    "fp32": 16,
}  # per trainable parameter, gradients included; ZeRO-3 divides them over the ranks


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Number of parameters of each part. The towers (`vision`) are frozen, everything else trains."""

    vision: int
    projector: int
    llm: int
    fusion: int
    decoder: int

    @property
    def trainable(self) -> int:
        return self.projector + self.llm + self.fusion + self.decoder


def count_parameters(config: EmmaConfig) -> Parameters:
    """Count the parameters of each part of a model."""
    with torch.device("meta"):
        emma = Emma(config)
    fusion = _count(emma.alignment.fusion) if emma.alignment else 0
    return Parameters(
        vision=_count(_towers(config.vision)),
        projector=_count(emma.projector),
        llm=_count(emma.llm),
        fusion=fusion,
        decoder=_count(emma.alignment) - fusion if emma.alignment else 0,
    )


def _towers(config: VisionConfig) -> Towers:
    with torch.device("meta"):
        return Towers(config)


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one sample. A multiply-add counts as two; norms and activations are not counted.

    useful      one forward pass of every part, and the backward pass of the parts that train
    recompute   forward passes that activation checkpointing repeats
    """

    towers: float
    language: float
    head: float
    alignment: float
    recompute: float

    @property
    def useful(self) -> float:
        return self.towers + 3 * (self.language + self.head + self.alignment)

    @property
    def total(self) -> float:
        return self.useful + self.recompute


def flops_per_sample(
    config: EmmaConfig, text_tokens: int, supervised: int, segment_layers: int, keep_layers: int
) -> Flops:
    """Count the FLOPs of one image and its dialogue. `language` includes the projector.

    Args:
        supervised: number of supervised text tokens, for which logits are computed.
        segment_layers: layers per activation-checkpoint segment; 0 recomputes nothing.
        keep_layers: number of final layers that keep their activations instead of recomputing them.
    """
    with torch.device("meta"):
        emma = Emma(config)
    patches = config.vision.num_patches
    length = patches + text_tokens
    layer = mamba_layer_flops(config.llm, length)
    recomputed = max(0, config.llm.num_layers - keep_layers) if segment_layers else 0
    alignment = 0.0
    if config.alignment and emma.alignment:
        blocks = sum(1 for name, _ in emma.alignment.named_modules() if name.endswith("mixer"))
        alignment = MULTIPLY_ADD * _matrix_parameters(emma.alignment) * patches + blocks * _scan_flops(
            config.llm, patches
        )
        alignment += (
            len(config.alignment.taps) * 2 * MULTIPLY_ADD * patches**2 * config.llm.d_model / 2
        )  # causal attention
    return Flops(
        towers=sum(_tower_flops(tower, config.vision) for tower in config.vision.towers),
        language=config.llm.num_layers * layer + MULTIPLY_ADD * _matrix_parameters(emma.projector) * patches,
        head=MULTIPLY_ADD * config.llm.d_model * config.llm.vocab_size * supervised,
        alignment=alignment,
        recompute=recomputed * layer,
    )


def mamba_layer_flops(config: MambaConfig, length: int) -> float:
    """Count the FLOPs of one block's forward pass over `length` positions: projections and scan."""
    inner, state = config.d_inner, config.d_state
    if config.kind == "mamba1":
        width = 2 * inner * config.d_model + inner * (config.dt_rank + 2 * state) + config.dt_rank * inner
    else:
        width = config.d_model * (2 * inner + 2 * config.num_groups * state + config.num_heads)
    return MULTIPLY_ADD * length * (width + inner * config.d_model) + _scan_flops(config, length)


def _scan_flops(config: MambaConfig, length: int) -> float:
    """Count the FLOPs of a scan: nine per state and position in Mamba-1, chunked SSD's matrix products in Mamba-2."""
    inner, state = config.d_inner, config.d_state
    if config.kind == "mamba1":
        return 9.0 * length * inner * state
    chunk = min(config.chunk_size, length)
    within = chunk * (config.num_groups * state + inner)
    return float(MULTIPLY_ADD * length * (within + 2 * inner * state))


def _tower_flops(tower: TowerConfig, vision: VisionConfig) -> float:
    """Count the FLOPs of a tower's forward pass.

    They are derived from the number of its weights, because the hidden width of timm's SigLIP is irregular.
    """
    blocks = _count(_towers(replace(vision, towers=(tower,))))
    attention = tower.num_blocks * 2 * MULTIPLY_ADD * vision.num_patches**2 * tower.width
    return MULTIPLY_ADD * blocks * vision.num_patches + attention


def _matrix_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
