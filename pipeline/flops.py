"""What a model costs: parameters by part, operations by part. From the config alone, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from model.config import EmmaConfig, MambaConfig, TowerConfig, VisionConfig
from model.emma import Emma
from model.vision import Towers

GIB = 1 << 30  # bytes
MULTIPLY_ADD = 2
CHECKPOINT_BYTES = 12  # of a trainable parameter: fp32 master weights and Adam's two moments
STATE_BYTES = {"bf16": 18, "autocast": 16, "fp32": 16}  # of one in training: gradients too; ZeRO-3 shares them all


@dataclass(frozen=True)
class Parameters:
    """Counts by part; the towers are frozen, everything else trains."""

    vision: int
    projector: int
    llm: int
    fusion: int
    decoder: int

    @property
    def trainable(self) -> int:
        return self.projector + self.llm + self.fusion + self.decoder


def count_parameters(config: EmmaConfig) -> Parameters:
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


@dataclass(frozen=True)
class Flops:
    """Operations of one sample: a multiply-add counts two, norms and activations nothing.

    `useful` is one forward pass of everything and the backward pass of what trains; `recompute` what activation
    checkpointing adds to it.
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
    """For one picture and its dialogue; the projector is counted with the language model."""
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
    """Forward pass of one block over `length` positions: projections and scan."""
    inner, state = config.d_inner, config.d_state
    if config.kind == "mamba1":
        width = 2 * inner * config.d_model + inner * (config.dt_rank + 2 * state) + config.dt_rank * inner
    else:
        width = config.d_model * (2 * inner + 2 * config.num_groups * state + config.num_heads)
    return MULTIPLY_ADD * length * (width + inner * config.d_model) + _scan_flops(config, length)


def _scan_flops(config: MambaConfig, length: int) -> float:
    """Mamba-1: nine operations per state and position. Mamba-2: the products of the chunked form (SSD)."""
    inner, state = config.d_inner, config.d_state
    if config.kind == "mamba1":
        return 9.0 * length * inner * state
    chunk = min(config.chunk_size, length)
    within = chunk * (config.num_groups * state + inner)
    return float(MULTIPLY_ADD * length * (within + 2 * inner * state))


def _tower_flops(tower: TowerConfig, vision: VisionConfig) -> float:
    """Forward pass of the blocks that run. The hidden width of timm's SigLIP is its own, so weights are counted."""
    blocks = _count(_towers(replace(vision, towers=(tower,))))
    attention = tower.num_blocks * 2 * MULTIPLY_ADD * vision.num_patches**2 * tower.width
    return MULTIPLY_ADD * blocks * vision.num_patches + attention


def _matrix_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
