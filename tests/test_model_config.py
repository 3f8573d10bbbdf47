"""Model presets and configurations: recorded values, tiny presets, and invalid settings."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest
import torch

from model.config import AlignmentConfig, EmmaConfig
from model.emma import Emma
from model.presets import ABLATIONS, PRESETS, make_presets, preset, scale_taps

DIGESTS = {  # if a preset changes, earlier checkpoints and exported models can no longer be loaded
    "emma_v1": "0f7d5f86cc1e594b",
    "emma_v2": "5230ad299f2a383d",
    "cobra": "6d2f44ef73078ce6",
    "cobra_v2": "eff32cc50bbeb2fc",
    "no_mff": "d6b2dc54c5afd4db",
    "no_mff_v2": "6015a429f9ce5fd9",
    "csm": "578e550c12ed14b4",
    "csm_v2": "f02632735a3583e3",
    "avf": "71fd257d2551d1eb",
    "avf_v2": "c7a72f2b3e8393dd",
    "release": "6a96b76c822fda23",
    "release_v2": "6e2f9650d1095a03",
    "tiny_v1": "32a0983f6964179a",
    "tiny_v2": "b2ddea082cc727ed",
    "tiny_cobra": "5fe770cf5e1a56f7",
    "tiny_cobra_v2": "b5ba8e0cd0d7d5ba",
    "tiny_no_mff": "8ecb3fbfe521829d",
    "tiny_no_mff_v2": "6de247c88d09a9e6",
    "tiny_csm": "92c4d3d6de634eee",
    "tiny_csm_v2": "b96382bf963b5244",
    "tiny_avf": "042b5f00767383d7",
    "tiny_avf_v2": "2b6525ef9d6ff98a",
    "tiny_release": "4cb61eaa96afa095",
    "tiny_release_v2": "0507e0995ed4aaf0",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_each_preset_still_has_its_recorded_digest(name: str) -> None:
    written = json.dumps(asdict(preset(name)), sort_keys=True)
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == DIGESTS[name]


def test_full_size_presets_have_the_dimensions_of_the_paper() -> None:
    v1, v2 = preset("emma_v1"), preset("emma_v2")
    assert v1.vision == v2.vision
    assert (v1.vision.num_patches, v1.vision.width, v1.vision.seen_px) == (729, 2176, 378)
    assert [tower.num_blocks for tower in v1.vision.towers] == [23, 26]
    assert (v1.llm.vocab_size, v1.llm.d_state, v1.llm.dt_rank) == (50280, 16, 160)
    assert (v2.llm.vocab_size, v2.llm.d_state, v2.llm.num_heads, v2.llm.chunk_size) == (50288, 128, 80, 256)
    assert (v1.template, v2.template) == ("zephyr", "base")
    for config in (v1, v2):
        assert config.alignment is not None
        assert (config.alignment.taps, config.alignment.tap, config.alignment.num_values) == (
            (24, 36, 48),
            "mixer",
            588,
        )


def test_every_preset_has_a_tiny_preset_with_the_same_components() -> None:
    full = [name for name in PRESETS if not name.startswith("tiny_")]
    assert len(PRESETS) == 2 * len(full) == 24
    for name in full:
        large, small = preset(name), preset(f"tiny_{name.removeprefix('emma_')}")
        assert small.llm.kind == large.llm.kind and small.cross_scan == large.cross_scan
        assert (small.alignment is None) == (large.alignment is None)
        if large.alignment and small.alignment:
            assert (small.alignment.fusion, small.alignment.target) == (large.alignment.fusion, large.alignment.target)
            assert len(small.alignment.taps) == len(large.alignment.taps)


def two_taps(full: EmmaConfig) -> EmmaConfig:
    assert full.alignment is not None
    return replace(full, alignment=replace(full.alignment, taps=(16, 60)))


@pytest.mark.parametrize("name", ["tiny_two_taps", "tiny_two_taps_v2"])
def test_the_tiny_version_of_a_new_two_tap_preset_gives_every_parameter_a_gradient(name: str) -> None:
    config = make_presets((*ABLATIONS, two_taps))[name]
    assert config.alignment is not None
    assert config.alignment.taps == (1, 5)
    vision = config.vision
    features, target = torch.randn(1, vision.num_patches, vision.width), torch.randn(1, vision.num_patches, 588)
    emma = Emma(config)
    losses = emma(torch.arange(8)[None], torch.arange(8)[None], features, target)
    assert losses.align_error is not None
    (losses.text_nll + losses.align_error).sum().backward()
    assert all(parameter.grad is not None for parameter in emma.parameters())


@pytest.mark.parametrize(
    ("taps", "scaled"),
    [((24, 36, 48), (2, 3, 4)), ((), ()), ((0, 63), (0, 5)), ((1, 2, 3), (0, 1, 2)), ((61, 62, 63), (3, 4, 5))],
)
def test_taps_scaled_to_fewer_layers_stay_at_distinct_layers(taps: tuple[int, ...], scaled: tuple[int, ...]) -> None:
    assert scale_taps(taps, 64, to_layers=6) == scaled


def test_decoder_blocks_of_the_other_mamba_kind_get_its_state_size() -> None:
    v1, v2 = preset("emma_v1"), preset("emma_v2")
    assert v1.mamba_blocks(None) == v1.llm
    assert (v1.mamba_blocks("mamba2").d_state, v2.mamba_blocks("mamba1").d_state) == (128, 16)
    assert v1.mamba_blocks("mamba1", 512).d_model == 512


def test_the_error_for_an_unknown_preset_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no model preset 'tiny_v3', did you mean 'tiny_v[12]'; presets: emma_v1"):
        preset("tiny_v3")


@pytest.mark.parametrize(
    ("taps", "fusion", "message"),
    [
        ((), "cascade", "only tapped states are fused"),
        ((1, 2), "none", "only tapped states are fused"),
        ((2, 1), "cascade", "must be increasing"),
        ((1, 1), "cascade", "must be increasing"),
    ],
)
def test_an_alignment_config_with_taps_that_its_fusion_cannot_use_is_rejected(
    taps: tuple[int, ...], fusion: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(taps=taps, num_values=588, weight=1.0, fusion=fusion)  # type: ignore[arg-type]


def test_a_config_with_taps_beyond_the_last_layer_is_rejected() -> None:
    config = preset("tiny_v2")
    with pytest.raises(ValueError, match="reach beyond 2 layers"):
        replace(config, llm=replace(config.llm, num_layers=2))
