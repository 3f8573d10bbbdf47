"""Model presets: the models of the EMMA paper, the paper's ablations, and a tiny version of each.

To add the preset NAME, write a function NAME that changes a full model, and list it in `ABLATIONS`. This also adds the
Mamba-2 version `NAME_v2` and the tiny versions `tiny_NAME` and `tiny_NAME_v2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from model.config import AlignmentConfig, EmmaConfig, MambaConfig, TowerConfig, VisionConfig
from model.errors import did_you_mean

DINOV2 = TowerConfig(
    name="dinov2",
    timm_name="vit_large_patch14_reg4_dinov2.lvd142m",
    width=1024,
    depth=24,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SIGLIP = TowerConfig(
    name="siglip",
    timm_name="vit_so400m_patch14_siglip_384",
    width=1152,
    depth=27,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
DINOSIGLIP = VisionConfig(towers=(DINOV2, SIGLIP))
PIXELS_PER_PATCH = 3 * DINOSIGLIP.patch_px**2

MAMBA1_2P8B = MambaConfig(
    kind="mamba1", d_model=2560, num_layers=64, vocab_size=50280, d_state=16, weights="xiuyul/mamba-2.8b-zephyr"
)
MAMBA2_2P7B = MambaConfig(
    kind="mamba2", d_model=2560, num_layers=64, vocab_size=50288, d_state=128, weights="state-spaces/mamba2-2.7b"
)


def alignment_weight(num_values: int, num_patches: int = DINOSIGLIP.num_patches) -> float:
    """Return the weight of the mean squared error that is equivalent to the paper's published code.

    The published code multiplies the squared error, summed over the patches and values of an image, by 1e-5.
    """
    return 1e-5 * num_patches * num_values


def scale_taps(taps: tuple[int, ...], num_layers: int, *, to_layers: int) -> tuple[int, ...]:
    """Scale the tapped layers of a model with `num_layers` layers to a model with `to_layers` layers.

    The results stay distinct, even if `to_layers` is small.
    """
    scaled: list[int] = []
    for position, tap in enumerate(taps):
        first = scaled[-1] + 1 if scaled else 0
        last = to_layers - len(taps) + position  # so that each later tap has a layer
        scaled.append(min(max(tap * to_layers // num_layers, first), last))
    return tuple(scaled)


def paper_taps(num_layers: int) -> tuple[int, ...]:
    """Return the paper's tapped layers, which are 24, 36 and 48 of 64, scaled to `num_layers` layers."""
    return scale_taps((24, 36, 48), 64, to_layers=num_layers)


# -- The models of the paper -------------------------------------------------------------------------------------------


def emma_v1() -> EmmaConfig:
    """Return EMMA on Mamba-1 (Tables 1-3, row "EMMA-V1"; Table 5, row "EMMA")."""
    alignment = AlignmentConfig(
        taps=paper_taps(MAMBA1_2P8B.num_layers),
        num_values=PIXELS_PER_PATCH,
        weight=alignment_weight(PIXELS_PER_PATCH),
    )
    return EmmaConfig(name="emma_v1", vision=DINOSIGLIP, llm=MAMBA1_2P8B, template="zephyr", alignment=alignment)


def emma_v2() -> EmmaConfig:
    """Return EMMA on Mamba-2 (Tables 1-4, row "EMMA-V2")."""
    return replace(emma_v1(), name="emma_v2", llm=MAMBA2_2P7B, template="base")


# -- The ablations of the paper, which change EMMA-V1 ------------------------------------------------------------------


def cobra(full: EmmaConfig) -> EmmaConfig:
    """Train without the alignment loss, like Cobra (Tables 1-4, row "Cobra"; Table 5, row "−PAL")."""
    return replace(full, alignment=None)


def no_mff(full: EmmaConfig) -> EmmaConfig:
    """Decode the image from the final state alone, without multi-scale feature fusion (Table 5, row "−MFF")."""
    return _with_alignment(full, taps=(), fusion="none")


def csm(full: EmmaConfig) -> EmmaConfig:
    """Scan the features in four directions before the projector: the cross-scan mechanism (Table 5, row "+CSM")."""
    return replace(full, cross_scan=True)


def avf(full: EmmaConfig) -> EmmaConfig:
    """Predict visual features instead of pixels; a value keeps the loss weight of a pixel (Table 5, row "+AVF")."""
    width = full.vision.width
    return _with_alignment(full, target="features", num_values=width, weight=alignment_weight(width))


def release(full: EmmaConfig) -> EmmaConfig:
    """Train the model of the paper's published code, which differs from the paper.

    The tapped states and the final state are concatenated, learned queries attend to them, each time followed by a
    Mamba-2 block, and the target is SigLIP's patch embedding.

    Differs from the published code, which trains a copy of the patch embedding: here it is frozen.
    """
    width = full.vision.towers[-1].width
    return _with_alignment(
        full,
        fusion="concat",
        decoder_layers=0,
        decoder_kind="mamba2",
        target="patch_embedding",
        num_values=width,
        weight=alignment_weight(width),
    )


ABLATIONS: tuple[Callable[[EmmaConfig], EmmaConfig], ...] = (cobra, no_mff, csm, avf, release)


def _with_alignment(full: EmmaConfig, **changes: Any) -> EmmaConfig:
    assert full.alignment is not None
    return replace(full, alignment=replace(full.alignment, **changes))


# -- Tiny versions -----------------------------------------------------------------------------------------------------


def tiny(full: EmmaConfig) -> EmmaConfig:
    """Shrink a model so that it can be trained on a laptop's CPU: 7×7 patches, six layers, a vocabulary of 1024."""
    overrides = {"img_size": 100, "depth": 3, "num_heads": 2}
    towers = tuple(
        replace(tower, width=width, depth=3, overrides={**overrides, "embed_dim": width})
        for tower, width in zip(full.vision.towers, (96, 64), strict=True)
    )
    vision = VisionConfig(towers=towers, image_px=100)
    llm = replace(
        full.llm,
        d_model=96,
        num_layers=6,
        vocab_size=1024,
        d_state=16 if full.llm.kind == "mamba2" else 8,
        weights=None,
        chunk_size=32,
    )
    alignment = full.alignment
    if alignment is not None:
        widths = {"pixels": PIXELS_PER_PATCH, "features": vision.width, "patch_embedding": towers[-1].width}
        num_values = widths[alignment.target]
        alignment = replace(
            alignment,
            taps=scale_taps(alignment.taps, full.llm.num_layers, to_layers=llm.num_layers),
            num_values=num_values,
            weight=alignment_weight(num_values, vision.num_patches),
            head_dim=32,
            decoder_layers=min(alignment.decoder_layers, 2),
        )
    return replace(full, vision=vision, llm=llm, alignment=alignment, tokenizer=None, max_text_tokens=256)


def make_presets(ablations: tuple[Callable[[EmmaConfig], EmmaConfig], ...]) -> dict[str, EmmaConfig]:
    """Return every preset by name: the two models, the ablations of both, and the tiny version of each."""
    full = {"emma_v1": emma_v1(), "emma_v2": emma_v2()}
    for ablation in ablations:
        full[ablation.__name__] = ablation(emma_v1())
        full[f"{ablation.__name__}_v2"] = ablation(emma_v2())
    small = {f"tiny_{name.removeprefix('emma_')}": tiny(config) for name, config in full.items()}
    return {name: replace(config, name=name) for name, config in (full | small).items()}


PRESETS = make_presets(ABLATIONS)


def preset(name: str) -> EmmaConfig:
    """Return the model configuration of a preset. Raises: ValueError that lists all presets if `name` is unknown."""
    if name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"no model preset {name!r}{did_you_mean(name, PRESETS)}; presets: {', '.join(PRESETS)}")
