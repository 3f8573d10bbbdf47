"""The sample plan: order of samples, one modality per global batch, and the slices of ranks."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from pipeline.data.plan import FILLER, Plan, rank_slices


def make_plan(count=1000, text_only=0.1, seed=7, global_batch=16, window=4):
    noise = np.random.Philox(key=3).random_raw(count)
    return Plan(
        text_tokens=(5 + noise % 295).astype(np.int32),
        has_image=(noise >> 32) % 1000 >= 1000 * text_only,
        manifest_sha256="ab" * 32,
        seed=seed,
        global_batch=global_batch,
        window=window,
    )


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("text_only", [0.0, 0.1, 1.0])
def test_every_sample_occurs_exactly_once_per_epoch(count, text_only):
    plan = make_plan(count, text_only)
    for epoch in (0, 1):
        ids = plan.epoch(epoch)
        assert ids.shape == (plan.steps_per_epoch, plan.global_batch)
        assert sorted(ids[ids != FILLER]) == list(range(count))


def test_every_global_batch_has_one_modality_and_filler_rows_only_at_its_end():
    plan = make_plan()
    for ids in plan.epoch(0):
        real = ids[ids != FILLER]
        assert len(set(plan.has_image[real])) == 1
        assert (ids[: len(real)] == real).all()


def test_the_sample_order_differs_between_epochs_seeds_and_data_sets():
    plan = make_plan()
    others = [plan.epoch(1), make_plan(seed=8).epoch(0), replace(plan, manifest_sha256="cd" * 32).epoch(0)]
    for other in others:
        assert (other != plan.epoch(0)).mean() > 0.9


def test_the_longest_batch_with_images_is_the_first_of_the_epoch():
    plan = make_plan()
    epoch = plan.epoch(0)
    with_images = epoch[plan.has_image[epoch[:, 0]]]
    longest = np.where(with_images == FILLER, 0, plan.text_tokens[with_images]).max()
    assert plan.has_image[epoch[0, 0]]
    assert plan.text_tokens[epoch[0][epoch[0] != FILLER]].max() == longest


def test_step_numbers_continue_across_epochs():
    plan = make_plan(100)
    steps = [plan.step(step) for step in range(2 * plan.steps_per_epoch)]
    assert (np.stack(steps) == np.concatenate([plan.epoch(0), plan.epoch(1)])).all()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (1, 4), (2, 8), (2, 2), (8, 2), (16, 1)])
def test_the_slices_of_all_ranks_together_equal_the_global_batch(world_size, micro_batch):
    ids = make_plan().step(3)
    slices = [rank_slices(ids, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)]
    assert {len(part) for rank in slices for part in rank} == {micro_batch}
    assert sorted(np.concatenate([part for rank in slices for part in rank])) == sorted(ids)


def test_sorting_inside_windows_keeps_padding_below_one_percent():
    plan = make_plan(20_000, text_only=0.0, window=100)
    lengths = np.where(plan.epoch(0) == FILLER, 0, plan.text_tokens[plan.epoch(0)])
    padded = lengths.max(axis=1).sum() * plan.global_batch
    assert 1 - lengths.sum() / padded < 0.01


def test_the_sample_order_equals_its_recorded_digest():
    """The order must never change, because checkpoints resume in the middle of an epoch."""
    ids = np.concatenate([make_plan().epoch(0), make_plan().epoch(3)])
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "c9588c8e18be9e0c94e8552504eaff9914adcb185f025e4a0ab07ec1bcc6e0c3"


def test_a_plan_without_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples to plan"):
        make_plan(0)
