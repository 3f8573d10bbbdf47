"""Values of a log line: averages over a log window, times of the slowest rank, FLOPs, and timers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.presets import preset
from pipeline.data.by_source import Sources
from pipeline.distributed.ranks import Ranks
from pipeline.flops import flops_per_sample
from pipeline.metrics.throughput import UsefulFlops, peak_flops, peak_flops_of_ranks
from pipeline.metrics.timers import COLLECT_EVERY, GarbageCollection, TowerTimer
from pipeline.metrics.window import Window, slowest_rank
from pipeline.recipe import load_recipe
from pipeline.step import Requests, StepReport, Timings
from preprocess.shards.manifest import load_index


def batch(samples, supervised, images=0, tokens=100, padding=0.0):
    sources = SimpleNamespace(samples=np.array(samples), supervised_tokens=np.array(supervised))
    return SimpleNamespace(
        sources=sources,
        samples=sum(samples),
        supervised_tokens=sum(supervised),
        images=images,
        tokens=tokens,
        padding_ratio=padding,
    )


ALONE = (Timings(),)


def report(by_source, timings=ALONE, total=1.0):
    return StepReport(
        text=total,
        align=None,
        total=total,
        grad_norm=1.0,
        text_by_source=np.array(by_source, float),
        requests=Requests(),
        timings=list(timings),
    )


def timings(data_wait, towers, gc):
    return Timings(data_wait_s=data_wait, towers_s=towers, gc_s=gc)


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file, planning=True)


def window(recipe, peak_flops=None):
    return Window(recipe, ["a", "b"], peak_flops=peak_flops)


@pytest.mark.parametrize(("mean", "loss"), [("token", (6 + 2) / (3 + 1)), ("sample", (6 + 2) / (2 + 1))])
def test_losses_by_source_are_means_per_token_or_per_sample_as_the_recipe_says(recipe_file, mean, loss):
    each = window(load_recipe(recipe_file, [f"loss.text={mean}"], planning=True))
    each.add(batch([2, 0], [3, 0]), report([6, 0]))
    each.add(batch([1, 0], [1, 0]), report([2, 0]))
    values = each.close()
    assert values["loss/text/a"] == loss
    assert values["loss/text/b"] is None
    assert (values["data/samples/a"], values["data/samples/b"]) == (3, 0)


def test_a_step_with_a_nonfinite_loss_is_excluded_from_the_average(recipe):
    each = window(recipe)
    each.add(batch([1, 1], [2, 2]), report([4, 2]))
    each.add(batch([1, 1], [2, 2]), report([np.nan, np.nan], total=np.nan))
    assert each.close()["loss/text/a"] == 2


def test_the_data_wait_of_a_step_is_that_of_its_slowest_rank(recipe):
    each = window(recipe)
    each.add(batch([1, 1], [1, 1]), report([1, 1], [timings(0.1, 1, 0), timings(0.3, 3, 0.5)]))
    each.add(batch([1, 1], [1, 1]), report([1, 1], [timings(0.5, 1, 0), timings(0.1, 1, 0)]))
    values = each.close()
    assert values["time/data_wait_s"] == pytest.approx((0.3 + 0.5) / 2)
    assert values["time/gc_s"] == 0.5
    assert (values["ranks/slowest"], values["ranks/slowest_ratio"]) == (1, 2)


def test_the_slowest_ratio_divides_the_slowest_time_by_the_median_time():
    assert slowest_rank([1.0, 1.1, 5.5, 1.2]) == {"ranks/slowest": 2, "ranks/slowest_ratio": 5.5 / 1.1}
    assert slowest_rank([0.0, 0.0]) == {"ranks/slowest": None, "ranks/slowest_ratio": None}


def test_excluded_time_does_not_count_as_step_time(recipe, monkeypatch):
    times = iter([0.0, 11.0, 11.0])
    monkeypatch.setattr("pipeline.metrics.window.time.monotonic", lambda: next(times))
    each = window(recipe, peak_flops=1e9)
    each.add(batch([1, 1], [5, 5], tokens=100), report([1, 1]))
    each.exclude("save", 6.0)
    values = each.close()
    assert (values["time/step_s"], values["time/save_stall_s"]) == (5, 6)
    assert values["speed/tokens_per_s"] == 20
    assert values["speed/mfu"] == UsefulFlops(recipe.config).of_batch(batch([1, 1], [5, 5], tokens=100)) / 5e9


@pytest.mark.parametrize("model", ["tiny_v1", "tiny_v2"])
def test_useful_flops_of_a_batch_agree_with_the_flops_per_sample(model):
    config = preset(model)
    flops, patches = UsefulFlops(config), config.vision.num_patches
    both = batch([3, 1], [12, 4], images=4, tokens=4 * (30 + patches))
    one = flops_per_sample(config, text_tokens=30, supervised=4, segment_layers=0, keep_layers=0)
    assert flops.of_batch(both) == pytest.approx(4 * one.useful)
    text_only = flops.of_batch(batch([3, 1], [12, 4], tokens=4 * 30))
    assert 0 < text_only < flops.of_batch(both) - 4 * one.towers


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("Some GPU", None),
    ],
)
def test_peak_flops_are_looked_up_by_the_name_of_the_device(name, peak):
    assert peak_flops(name) == peak


def test_the_cpu_has_no_peak_flops():
    assert peak_flops_of_ranks(Ranks(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))) is None


def test_samples_and_tokens_of_a_batch_are_counted_by_source(shards):
    index = load_index(shards)
    sources = Sources(index)
    assert sources.names == ["squares"]
    ids, mine = np.array([3, 4, 5, -1]), [np.array([3, 4]), np.array([5, -1])]
    counts = sources.of_batch(ids, mine)
    assert counts.samples.tolist() == [3]
    assert counts.supervised_tokens.tolist() == [sum(index.column("num_supervised_tokens").to_pylist()[3:6])]
    assert counts.rows.tolist() == [[0, 0], [0, 0]]


def test_garbage_is_collected_only_once_per_fixed_number_of_steps():
    import gc

    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(phase))
    try:
        with GarbageCollection() as garbage:
            collected.clear()
            assert not gc.isenabled()
            for step in range(1, COLLECT_EVERY + 1):
                assert not collected, f"step {step}"
                garbage.after_step(step)
            assert collected == ["start", "stop"]
            assert garbage.pop_seconds() > 0
            assert garbage.pop_seconds() == 0
        assert gc.isenabled()
    finally:
        gc.callbacks.pop()


def test_the_tower_timer_measures_each_forward_pass_of_the_vision_towers():
    towers = torch.nn.Linear(2, 2)
    clock = TowerTimer(towers, torch.device("cpu"))
    assert clock.pop_seconds() == 0
    towers(torch.zeros(1, 2))
    towers(torch.zeros(1, 2))
    assert len(clock.laps) == 2
    assert clock.pop_seconds() > 0
    assert clock.pop_seconds() == 0
