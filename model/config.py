"""The numbers that define every model of the paper; an ablation is one visible delta.

No torch import: preprocessing reads these on CPU nodes. The towers' and language models' own numbers are those of the
published checkpoints; each preset names the table of the EMMA paper that it reproduces.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOKENIZER = "EleutherAI/gpt-neox-20b"
EOS_ID, PAD_ID = 0, 1  # in TOKENIZER
IGNORE_INDEX = -100  # target of positions that carry no loss; same value as in transformers

MambaKind = Literal["mamba1", "mamba2"]
PUBLISHED_D_STATE: dict[str, int] = {"mamba1": 16, "mamba2": 128}
Target = Literal["pixels", "features", "patch_embedding"]


@dataclass(frozen=True)
class TowerConfig:
    """One frozen vision tower, as timm names it; `overrides` are timm keyword arguments that shrink it."""

    name: str
    timm_name: str
    width: int
    depth: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Blocks that run: the feature is the output of the second-to-last one, so the last never matters."""
        return self.depth - 1


@dataclass(frozen=True)
class VisionConfig:
    """The towers and the picture that they share. Channels are concatenated in the towers' order."""

    towers: tuple[TowerConfig, ...]
    image_px: int = 384
    patch_px: int = 14

    @property
    def grid(self) -> int:
        """Patches along one side; the pixels beyond `seen_px` on the right and at the bottom are never seen."""
        return self.image_px // self.patch_px

    @property
    def seen_px(self) -> int:
        return self.grid * self.patch_px

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def width(self) -> int:
        return sum(tower.width for tower in self.towers)


@dataclass(frozen=True)
class MambaConfig:
    """A Mamba language model in mamba_ssm's terms. `vocab_size` counts the rows of the embedding, padding included."""

    kind: MambaKind
    d_model: int
    num_layers: int
    vocab_size: int
    d_state: int
    weights: str | None = None
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 64
    num_groups: int = 1
    chunk_size: int = 256
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind == "mamba2" and self.d_inner % self.head_dim:
            raise ValueError(f"d_inner {self.d_inner} is not a multiple of head_dim {self.head_dim}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Mamba-1 only: rank of the step-size projection."""
        return -(-self.d_model // 16)

    @property
    def num_heads(self) -> int:
        """Mamba-2 only."""
        return self.d_inner // self.head_dim


@dataclass(frozen=True)
class AlignmentConfig:
    """The training-only part: which depths are fused, how, and what is reconstructed from them (EMMA Eq. 6-9).

    taps            0-based layers whose states feed the fusion, besides the final normed state
    tap             what a layer hands over: its mixer's branch (public code), or the residual stream after it
    fusion          "cascade" is Eq. 7-8; "concat" the public code's; "none" decodes the final state alone
    decoder_kind    None: the backbone's own kind of Mamba
    shift           0: position i may use patches up to i; 1: only the patches before it
    weight          multiplies the mean squared error of an image (over patches and values)
    """

    taps: tuple[int, ...]
    num_values: int
    weight: float
    target: Target = "pixels"
    tap: Literal["mixer", "residual"] = "mixer"
    fusion: Literal["cascade", "concat", "none"] = "cascade"
    head_dim: int = 64
    decoder_layers: int = 4
    decoder_width: int | None = None
    decoder_kind: MambaKind | None = None
    shift: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if (self.fusion == "none") != (not self.taps):
            raise ValueError(f"fusion {self.fusion!r} does not go with taps {self.taps}: taps are what is fused")
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps {self.taps} must be increasing")


@dataclass(frozen=True)
class EmmaConfig:
    """A whole model. `alignment=None` is the plain baseline; `cross_scan` scans the features before the projector."""

    name: str
    vision: VisionConfig
    llm: MambaConfig
    template: Literal["zephyr", "base"]
    alignment: AlignmentConfig | None
    cross_scan: bool = False
    tokenizer: str | None = TOKENIZER
    max_text_tokens: int = 2048

    def mamba_of(self, kind: MambaKind | None, d_model: int | None = None) -> MambaConfig:
        """Mamba blocks beside the language model's: its kind and width, or others; a kind has its own state size."""
        d_model = d_model or self.llm.d_model
        if kind in (None, self.llm.kind):
            return replace(self.llm, d_model=d_model)
        return replace(self.llm, kind=kind, d_model=d_model, d_state=PUBLISHED_D_STATE[kind])

    def __post_init__(self) -> None:
        if self.alignment and any(tap >= self.llm.num_layers for tap in self.alignment.taps):
            raise ValueError(f"{self.name}: taps {self.alignment.taps} reach beyond {self.llm.num_layers} layers")


def config_from_dict(data: dict[str, Any]) -> EmmaConfig:
    """The inverse of `dataclasses.asdict`, even after JSON, which has no tuples. TypeError for unknown fields."""
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


def alignment_weight(num_values: int, num_patches: int = 729) -> float:
    """The public code's 1e-5 per squared error of one image, as the weight of a mean over patches and values."""
    return 1e-5 * num_patches * num_values


def paper_taps(num_layers: int) -> tuple[int, ...]:
    """Layers 24, 36 and 48 of 64, and the same fractions of other depths."""
    return tuple(num_layers * layer // 64 for layer in (24, 36, 48))


DINOV2 = TowerConfig("dinov2", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, 24, IMAGENET_MEAN, IMAGENET_STD)
SIGLIP = TowerConfig("siglip", "vit_so400m_patch14_siglip_384", 1152, 27, (0.5,) * 3, (0.5,) * 3)
DINOSIGLIP = VisionConfig((DINOV2, SIGLIP))
PIXELS_PER_PATCH = 3 * DINOSIGLIP.patch_px**2

MAMBA1_2P8B = MambaConfig("mamba1", 2560, 64, 50280, d_state=16, weights="xiuyul/mamba-2.8b-zephyr")
MAMBA2_2P7B = MambaConfig("mamba2", 2560, 64, 50288, d_state=128, weights="state-spaces/mamba2-2.7b")


# -- Tables 1-3: the models ---------------------------------------------------------------------------------------


def emma_v1() -> EmmaConfig:
    alignment = AlignmentConfig(paper_taps(64), PIXELS_PER_PATCH, alignment_weight(PIXELS_PER_PATCH))
    return EmmaConfig("emma_v1", DINOSIGLIP, MAMBA1_2P8B, "zephyr", alignment)


def emma_v2() -> EmmaConfig:
    return replace(emma_v1(), name="emma_v2", llm=MAMBA2_2P7B, template="base")


# -- Table 5: the ablations (on V1 in the paper; `_v2` twins are made below) ----------------------------------------


def cobra(full: EmmaConfig) -> EmmaConfig:
    """−PAL: no alignment at all, the plain baseline."""
    return replace(full, alignment=None)


def no_mff(full: EmmaConfig) -> EmmaConfig:
    """−MFF: the picture is decoded from the final state alone."""
    return _realigned(full, taps=(), fusion="none")


def csm(full: EmmaConfig) -> EmmaConfig:
    """+CSM: the visual features are scanned in four directions before the projector."""
    return replace(full, cross_scan=True)


def avf(full: EmmaConfig) -> EmmaConfig:
    """+AVF: the target is the towers' features instead of pixels, at the same weight per element."""
    width = full.vision.width
    return _realigned(full, target="features", num_values=width, weight=alignment_weight(width))


# -- Not in the paper: what its public code trains -------------------------------------------------------------------


def release(full: EmmaConfig) -> EmmaConfig:
    """Four levels concatenated; learned queries; Mamba-2 blocks; SigLIP's patch embedding (here frozen) as target."""
    width = full.vision.towers[-1].width
    weight = alignment_weight(width)
    return _realigned(
        full,
        fusion="concat",
        decoder_layers=0,
        decoder_kind="mamba2",
        target="patch_embedding",
        num_values=width,
        weight=weight,
    )


def _realigned(full: EmmaConfig, **changes: Any) -> EmmaConfig:
    assert full.alignment is not None
    return replace(full, alignment=replace(full.alignment, **changes))


# -- Tiny twins: every preset at a size that trains on a laptop's CPU ------------------------------------------------


def tiny(full: EmmaConfig) -> EmmaConfig:
    """The same model, small: two three-block towers over 7×7 patches, six layers, a vocabulary of 1024 rows."""
    overrides = {"img_size": 100, "depth": 3, "num_heads": 2}
    towers = tuple(
        replace(tower, width=width, depth=3, overrides={**overrides, "embed_dim": width})
        for tower, width in zip(full.vision.towers, (96, 64), strict=True)
    )
    llm = replace(full.llm, d_model=96, num_layers=6, vocab_size=1024, weights=None, chunk_size=32)
    llm = replace(llm, d_state=16 if llm.kind == "mamba2" else 8)
    vision = VisionConfig(towers, image_px=100)
    alignment = full.alignment and _tiny_alignment(full.alignment, vision, llm)
    return replace(full, vision=vision, llm=llm, alignment=alignment, tokenizer=None, max_text_tokens=256)


def _tiny_alignment(full: AlignmentConfig, vision: VisionConfig, llm: MambaConfig) -> AlignmentConfig:
    widths = {"pixels": PIXELS_PER_PATCH, "features": vision.width, "patch_embedding": vision.towers[-1].width}
    num_values = widths[full.target]
    return replace(
        full,
        taps=paper_taps(llm.num_layers) if full.taps else (),
        num_values=num_values,
        weight=alignment_weight(num_values, vision.num_patches),
        head_dim=32,
        decoder_layers=min(full.decoder_layers, 2),
    )


def _presets() -> dict[str, EmmaConfig]:
    ablations: tuple[Callable[[EmmaConfig], EmmaConfig], ...] = (cobra, no_mff, csm, avf, release)
    full = {"emma_v1": emma_v1(), "emma_v2": emma_v2()}
    for make in ablations:
        full[make.__name__] = make(emma_v1())
        full[f"{make.__name__}_v2"] = make(emma_v2())
    small = {f"tiny_{name.removeprefix('emma_')}": tiny(config) for name, config in full.items()}
    return {name: replace(config, name=name) for name, config in (full | small).items()}


PRESETS = _presets()


def preset(name: str) -> EmmaConfig:
    """The model of that name. Raises: ValueError with the nearest name and the whole list."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no model preset {name!r}{hint} Presets: {', '.join(PRESETS)}")
