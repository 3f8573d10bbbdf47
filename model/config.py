"""Configuration classes of a model: vision towers, Mamba language model, alignment. `model.presets` has the values.

This module does not import torch, because preprocessing reads the configuration on CPU nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

EOS_ID, PAD_ID = 0, 1  # token ids of the GPT-NeoX-20B tokenizer
IGNORE_INDEX = -100  # target of positions that do not contribute to the loss; same value as in transformers

MambaKind = Literal["mamba1", "mamba2"]
PUBLISHED_D_STATE: dict[str, int] = {"mamba1": 16, "mamba2": 128}

Tap = Literal["mixer", "residual"]
Fusion = Literal["cascade", "concat", "none"]
Target = Literal["pixels", "features", "patch_embedding"]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Configuration of a frozen vision tower, which timm builds."""

    name: str
    """Short name, used for weight files and state dict keys."""

    timm_name: str
    """Name of the architecture and its published weights in timm."""

    width: int
    """Number of feature channels."""

    depth: int
    """Number of blocks in the published model."""

    mean: tuple[float, float, float]
    """Mean of each colour channel, subtracted from pixels in [0, 1]."""

    std: tuple[float, float, float]
    """Standard deviation of each colour channel, by which the pixels are divided after the mean is subtracted."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `timm.create_model` that change the architecture, for tiny towers."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks to build. The last block is not built, because the features are its input."""
        return self.depth - 1


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Configuration of the vision towers and of the image that all of them see."""

    towers: tuple[TowerConfig, ...]
    """Towers whose features are concatenated, in this order."""

    image_px: int = 384
    """Width and height of the image."""

    patch_px: int = 14
    """Width and height of a patch."""

    @property
    def grid(self) -> int:
        """Number of patches along one side."""
        return self.image_px // self.patch_px

    @property
    def seen_px(self) -> int:
        """Pixels along one side that belong to a patch. The towers ignore the rest, at the right and at the bottom."""
        return self.grid * self.patch_px

    @property
    def num_patches(self) -> int:
        """Number of patches in an image."""
        return self.grid**2

    @property
    def width(self) -> int:
        """Number of channels of the concatenated features."""
        return sum(tower.width for tower in self.towers)


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Configuration of a Mamba language model. Most fields are named as in mamba_ssm."""

    kind: MambaKind
    """Version of the Mamba blocks."""

    d_model: int
    """Width of the residual stream."""

    num_layers: int
    """Number of Mamba blocks."""

    vocab_size: int
    """Number of rows of the embedding, padding included."""

    d_state: int
    """State size of the scan, per channel (Mamba-1) or head (Mamba-2)."""

    weights: str | None = None
    """Hub id of the pretrained weights; None: random initialisation."""

    d_conv: int = 4
    """Kernel size of the causal convolution."""

    expand: int = 2
    """Width of the mixer as a multiple of `d_model`."""

    head_dim: int = 64
    """Channels per head (Mamba-2 only)."""

    num_groups: int = 1
    """Number of groups of heads that share B and C (Mamba-2 only)."""

    chunk_size: int = 256
    """Positions per chunk of the scan (Mamba-2 only)."""

    norm_eps: float = 1e-5
    """Epsilon of the RMSNorm before each mixer and after the last block."""

    def __post_init__(self) -> None:
        if self.kind == "mamba2" and self.d_inner % self.head_dim:
            raise ValueError(f"d_inner {self.d_inner} is not a multiple of head_dim {self.head_dim}")

    @property
    def d_inner(self) -> int:
        """Width of the mixer."""
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of the step size projection (Mamba-1 only)."""
        return -(-self.d_model // 16)

    @property
    def num_heads(self) -> int:
        """Number of heads of the mixer (Mamba-2 only)."""
        return self.d_inner // self.head_dim


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Configuration of the alignment loss, which is computed only in training (EMMA Eq. 6-9)."""

    taps: tuple[int, ...]
    """0-based layers of the language model whose states are fused with the final state, in increasing order."""

    num_values: int
    """Number of values that the decoder predicts for each patch."""

    weight: float
    """Factor of the alignment error, which is a mean over images, patches and values."""

    target: Target = "pixels"
    """What the decoder predicts: the image's pixels, the towers' features, or the last tower's patch embedding."""

    tap: Tap = "mixer"
    """State to use of a tapped layer: the mixer's output, as in the paper's published code, or the residual stream."""

    fusion: Fusion = "cascade"
    """How states are fused: by the cascade of EMMA Eq. 7-8, concatenated as in the paper's published code, or not."""

    head_dim: int = 64
    """Channels per head of the cross-attention."""

    decoder_layers: int = 4
    """Number of Mamba blocks in the decoder."""

    decoder_width: int | None = None
    """Width of the decoder; None: the language model's."""

    decoder_kind: MambaKind | None = None
    """Version of the Mamba blocks in fusion and decoder; None: the language model's."""

    shift: Literal[0, 1] = 0
    """0: a patch is predicted from itself and the patches before it; 1: only from the patches before it."""

    def __post_init__(self) -> None:
        if (self.fusion == "none") != (not self.taps):
            raise ValueError(f"fusion {self.fusion!r} does not go with taps {self.taps}: only tapped states are fused")
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps {self.taps} must be increasing")


@dataclass(frozen=True, kw_only=True)
class EmmaConfig:
    """Configuration of a whole model."""

    name: str
    """Name of the preset."""

    vision: VisionConfig
    """Vision towers."""

    llm: MambaConfig
    """Language model."""

    template: Literal["zephyr", "base"]
    """Prompt template."""

    alignment: AlignmentConfig | None
    """Alignment loss; None: the model is trained with the text loss alone, like the baseline Cobra."""

    cross_scan: bool = False
    """Whether the features are scanned in four directions before the projector."""

    tokenizer: str | None = "EleutherAI/gpt-neox-20b"
    """Hub id of the tokenizer; None: it must be given when shards are built."""

    max_text_tokens: int = 2048
    """Length at which a dialogue's text is truncated."""

    def __post_init__(self) -> None:
        if self.alignment and any(tap >= self.llm.num_layers for tap in self.alignment.taps):
            raise ValueError(f"{self.name}: taps {self.alignment.taps} reach beyond {self.llm.num_layers} layers")

    def mamba_blocks(self, kind: MambaKind | None, d_model: int | None = None) -> MambaConfig:
        """Return the configuration of Mamba blocks outside the language model.

        Args:
            kind: Mamba version; None: the language model's. A different version has its published state size.
            d_model: Width of the blocks; None: the language model's.
        """
        d_model = d_model or self.llm.d_model
        if kind in (None, self.llm.kind):
            return replace(self.llm, d_model=d_model)
        return replace(self.llm, kind=kind, d_model=d_model, d_state=PUBLISHED_D_STATE[kind])


def config_from_dict(data: dict[str, Any]) -> EmmaConfig:
    """Invert `dataclasses.asdict`. Tuples may have become lists, as in JSON. Raises: TypeError for unknown keys."""
    vision, alignment = data["vision"], data["alignment"]
    towers = tuple(
        TowerConfig(**tower | {"mean": tuple(tower["mean"]), "std": tuple(tower["std"])}) for tower in vision["towers"]
    )
    parts = {
        "vision": VisionConfig(**vision | {"towers": towers}),
        "llm": MambaConfig(**data["llm"]),
        "alignment": alignment and AlignmentConfig(**alignment | {"taps": tuple(alignment["taps"])}),
    }
    return EmmaConfig(**data | parts)
