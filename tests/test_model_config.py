"""The presets' numbers, and what a config refuses."""

from dataclasses import replace

import pytest

from model.config import PRESETS, AlignmentConfig, preset


def test_the_full_size_models_have_the_papers_numbers() -> None:
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


def test_every_preset_has_a_tiny_twin_of_the_same_form() -> None:
    full = [name for name in PRESETS if not name.startswith("tiny_")]
    assert len(PRESETS) == 2 * len(full) == 24
    for name in full:
        large, small = preset(name), preset(f"tiny_{name.removeprefix('emma_')}")
        assert small.llm.kind == large.llm.kind and small.cross_scan == large.cross_scan
        assert (small.alignment is None) == (large.alignment is None)
        if large.alignment and small.alignment:
            assert (small.alignment.fusion, small.alignment.target) == (large.alignment.fusion, large.alignment.target)
            assert len(small.alignment.taps) == len(large.alignment.taps)


def test_blocks_of_another_kind_than_the_language_models_have_that_kinds_state() -> None:
    v1, v2 = preset("emma_v1"), preset("emma_v2")
    assert v1.mamba_of(None) == v1.llm
    assert (v1.mamba_of("mamba2").d_state, v2.mamba_of("mamba1").d_state) == (128, 16)
    assert v1.mamba_of("mamba1", 512).d_model == 512


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no model preset 'tiny_v3'; did you mean 'tiny_v[12]'"):
        preset("tiny_v3")


@pytest.mark.parametrize(
    ("taps", "fusion", "message"),
    [
        ((), "cascade", "taps are what is fused"),
        ((1, 2), "none", "taps are what is fused"),
        ((2, 1), "cascade", "must be increasing"),
        ((1, 1), "cascade", "must be increasing"),
    ],
)
def test_taps_that_cannot_be_fused_are_refused(taps: tuple[int, ...], fusion: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(taps, 588, 1.0, fusion=fusion)  # type: ignore[arg-type]


def test_taps_beyond_the_last_layer_are_refused() -> None:
    config = preset("tiny_v2")
    with pytest.raises(ValueError, match="reach beyond 2 layers"):
        replace(config, llm=replace(config.llm, num_layers=2))
