"""Sizes, variants and runs of the ablation: what is trained, on how much data, and with which settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from model.config import EmmaConfig, VisionConfig
from model.presets import ABLATIONS, alignment_weight, emma_v2, paper_taps

VERSION = 1  # increase when a change to this package changes the result of a run, so that old runs are not mixed in
VARIANTS = ("emma", "no_mff", "cobra", "avf", "csm")
BASELINE = "cobra"
SEARCH_SEED = 100  # not among the test seeds, which count from 0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the models, of the data and of the training.

    Attributes:
        tower_widths, tower_heads: One entry for each of the two vision towers.
        images: Number of images by split.
        lrs, align_factors: Grid of the search. A factor multiplies the weight that the paper's published code implies.
        probe_images: Number of validation images to fit the linear probes on, and of test images to measure them on.
    """

    grid: int
    tower_widths: tuple[int, int]
    tower_heads: tuple[int, int]
    tower_blocks: int
    tower_steps: int
    tower_batch: int
    d_model: int
    num_layers: int
    d_state: int
    head_dim: int
    decoder_layers: int
    images: dict[str, int]
    batch: int
    steps: int
    lrs: tuple[float, ...]
    align_factors: tuple[float, ...]
    probe_images: int

    @cached_property
    def vision(self) -> VisionConfig:
        """The two towers of EMMA, smaller, and without pretrained weights."""
        image_px = 14 * self.grid
        towers = tuple(
            replace(
                tower,
                width=width,
                depth=self.tower_blocks + 1,
                overrides={
                    "embed_dim": width,
                    "depth": self.tower_blocks + 1,
                    "num_heads": heads,
                    "img_size": image_px,
                },
            )
            for tower, width, heads in zip(emma_v2().vision.towers, self.tower_widths, self.tower_heads, strict=True)
        )
        return VisionConfig(towers=towers, image_px=image_px)


SIZES = {
    "small": Size(
        grid=14,
        tower_widths=(192, 128),
        tower_heads=(3, 2),
        tower_blocks=4,
        tower_steps=2000,
        tower_batch=128,
        d_model=256,
        num_layers=12,
        d_state=64,
        head_dim=64,
        decoder_layers=4,
        images={"towers": 16384, "train": 32768, "val": 768, "test": 1536},
        batch=64,
        steps=2000,
        lrs=(5e-4, 1e-3, 2e-3),
        align_factors=(0.1, 1.0, 10.0),
        probe_images=256,
    ),
    "micro": Size(
        grid=4,
        tower_widths=(16, 16),
        tower_heads=(1, 1),
        tower_blocks=1,
        tower_steps=2,
        tower_batch=4,
        d_model=32,
        num_layers=4,
        d_state=8,
        head_dim=16,
        decoder_layers=1,
        images={"towers": 16, "train": 16, "val": 4, "test": 4},
        batch=4,
        steps=4,
        lrs=(1e-3, 2e-3),
        align_factors=(1.0,),
        probe_images=4,
    ),
}


def variant_config(size: Size, variant: str) -> EmmaConfig:
    """Return the configuration of a variant: EMMA-V2 at this size, changed as the preset of the same name."""
    full = emma_v2()
    assert full.alignment is not None
    llm = replace(
        full.llm,
        d_model=size.d_model,
        num_layers=size.num_layers,
        vocab_size=1024,
        d_state=size.d_state,
        head_dim=size.head_dim,
        weights=None,
        chunk_size=64,
    )
    alignment = replace(
        full.alignment,
        taps=paper_taps(size.num_layers),
        weight=alignment_weight(full.alignment.num_values, size.vision.num_patches),
        head_dim=size.head_dim,
        decoder_layers=size.decoder_layers,
    )
    small = replace(full, vision=size.vision, llm=llm, alignment=alignment, tokenizer=None, max_text_tokens=256)
    config = {"emma": lambda full: full, **{ablation.__name__: ablation for ablation in ABLATIONS}}[variant](small)
    return replace(config, name=variant)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a variant, its settings and its seed."""

    size: str
    variant: str
    seed: int
    lr: float
    align_factor: float

    @property
    def is_search(self) -> bool:
        """Whether the run selects settings. Such a run never sees the test questions."""
        return self.seed == SEARCH_SEED

    @property
    def name(self) -> str:
        factor = (
            "" if variant_config(SIZES[self.size], self.variant).alignment is None else f" align {self.align_factor:g}"
        )
        return f"{self.variant} seed {self.seed} lr {self.lr:g}{factor}"

    def key(self, inputs: dict[str, str]) -> str:
        """Return the name of the run's files: a hash of its settings, the sizes, and the hashes of its inputs."""
        described = {"version": VERSION, "run": asdict(self), "size": asdict(SIZES[self.size]), "inputs": inputs}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def search_runs(size: str, variants: tuple[str, ...] = VARIANTS) -> list[Run]:
    """Return the runs of the grid: every learning rate with every alignment weight, if the variant has one."""
    sizes = SIZES[size]
    return [
        Run(size=size, variant=variant, seed=SEARCH_SEED, lr=lr, align_factor=factor)
        for lr in sizes.lrs
        for variant in variants
        for factor in (sizes.align_factors if variant_config(sizes, variant).alignment else (1.0,))
    ]
