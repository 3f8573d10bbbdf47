"""Detection of spikes in losses and gradient norms, and what must not count as a spike."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.initial_model import initial_model
from pipeline.metrics.spikes import MEDIAN_STEPS, MIN_NOISE_STEPS, NOISE_STEPS, SpikeDetector
from pipeline.recipe import load_recipe
from pipeline.step import Requests, StepReport, row_losses

FIRST = MEDIAN_STEPS + MIN_NOISE_STEPS  # the first step that can be reported as a spike


def report(total, grad_norm=1.0):
    return StepReport(
        text=total,
        align=None,
        total=total,
        grad_norm=grad_norm,
        text_by_source=np.zeros(1),
        requests=Requests(),
        timings=[],
    )


def spike_keys(totals, grad_norms=None, has_images=True):
    spikes = SpikeDetector()
    norms = [1.0] * len(totals) if grad_norms is None else grad_norms
    steps = (spikes.check(report(*both), has_images=has_images) for both in zip(totals, norms, strict=True))
    return {step: [spike.key for spike in each] for step, each in enumerate(steps) if each}


def test_normal_noise_in_losses_and_gradient_norms_is_not_a_spike():
    noise = np.random.Generator(np.random.Philox(key=3))
    steps = np.arange(20_000)
    losses = (0.8 + 2.5 * np.exp(-steps / 300)) * (1 + 0.1 * noise.standard_normal(len(steps)))
    norms = np.exp(0.3 * noise.standard_normal(len(steps)))
    assert spike_keys(losses, norms) == {}


def test_a_spike_reports_its_value_the_usual_value_and_its_z_score():
    spikes = SpikeDetector()
    for step in range(NOISE_STEPS):
        assert spikes.check(report(1 + 0.01 * (-1) ** step), has_images=True) == []
    [spike] = spikes.check(report(3.0), has_images=True)
    assert (spike.key, spike.value) == ("loss/total", 3.0)
    assert spike.usual == pytest.approx(1, abs=0.011)
    assert spike.z > 20
    assert spikes.check(report(1.0), has_images=True) == []


def test_a_spike_does_not_prevent_detection_of_the_next_spike():
    losses = [1.0] * 3 * NOISE_STEPS
    losses[FIRST::40] = [4.0] * len(losses[FIRST::40])
    assert list(spike_keys(losses)) == list(range(FIRST, 3 * NOISE_STEPS, 40))


def test_a_higher_loss_that_recurs_every_twelve_steps_is_not_a_spike():
    losses = [1.0] * 3 * NOISE_STEPS
    losses[5::12] = [2.0] * len(losses[5::12])
    assert spike_keys(losses) == {}
    assert spike_keys([*losses, 30.0]) == {len(losses): ["loss/total"]}


def test_a_lasting_rise_of_the_loss_is_reported_only_in_its_first_steps():
    steps = list(spike_keys([1.0] * NOISE_STEPS + [2.0] * NOISE_STEPS))
    assert NOISE_STEPS in steps
    assert max(steps) <= NOISE_STEPS + MEDIAN_STEPS // 2


def test_the_first_steps_and_small_deviations_are_never_spikes():
    assert spike_keys([5.0] + [1.0] * FIRST + [1.2] * 3) == {}
    assert spike_keys([1.0] * (FIRST - 1) + [9.0]) == {}
    assert spike_keys([1.0] * FIRST + [9.0]) == {FIRST: ["loss/total"]}


def test_a_large_finite_gradient_norm_is_a_spike_and_an_infinite_norm_is_not():
    norms = [1.0] * FIRST
    assert spike_keys([1.0] * (FIRST + 1), [*norms, 30.0]) == {FIRST: ["optim/grad_norm"]}
    assert spike_keys([1.0] * (FIRST + 1), [*norms, math.inf]) == {}


def test_the_spike_detector_tracks_image_steps_and_text_only_steps_separately():
    spikes = SpikeDetector()
    for _ in range(NOISE_STEPS):
        assert spikes.check(report(1.0), has_images=True) == []
        assert spikes.check(report(7.0), has_images=False) == []


def test_random_targets_in_a_trained_batch_cause_a_loss_spike(recipe_file, shards, tmp_path):
    recipe = load_recipe(recipe_file, [f"data.shards={shards}", f"run.dir={tmp_path}", "optim.micro_batch=8"])
    data = TrainData(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    batch = next(batch for batch in data.from_step(0) if not batch.images)
    emma, towers, _ = initial_model(recipe)
    optimizer, spikes = torch.optim.AdamW(emma.parameters(), 3e-4), SpikeDetector()

    def step():
        optimizer.zero_grad()
        loss = row_losses(emma, towers, recipe, part)[0].sum() / batch.supervised_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(emma.parameters(), recipe.optim.clip)
        optimizer.step()
        return {spike.key for spike in spikes.check(report(loss.item(), norm.item()), has_images=False)}

    [part] = batch.micro_batches
    assert not any(step() for _ in range(FIRST + 8))
    noise = torch.randint(2, 200, part.targets.shape, generator=torch.Generator().manual_seed(0))
    part.targets[:] = torch.where(part.targets >= 0, noise, part.targets)
    assert "loss/total" in step()
