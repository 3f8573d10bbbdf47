"""The optimizer step: gradients compared with plain torch, nonfinite losses, and the combined reduction."""

import math

import pytest
import torch

from pipeline.checkpoint.folder import folder_name
from pipeline.checkpoint.layout import Layout
from pipeline.recipe import load_recipe
from pipeline.step import LossSums, Requests, Timings, Totals, reduce_step
from tests.support.launch import finish, fork_ranks
from tests.support.plain_torch import train_plainly

STEPS = 6  # one epoch: image batches and text-only batches; the last batch of each kind is incomplete
CONFIGS = {3: "ds_configs/zero3_small.json", 2: "ds_configs/zero2.json"}
ALIGNMENT_ONLY = ("alignment.", "projector.")


@pytest.fixture(scope="module")
def base(recipe_file, shards):
    return [recipe_file, f"data.shards={shards}", f"steps={STEPS}"]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """Train in plain torch. Return the gradients of each step and the modality of each step."""
    whole = [*base[1:], "optim.micro_batch=8", f"run.dir={tmp_path_factory.mktemp('none')}"]
    steps = train_plainly(load_recipe(base[0], whole))
    assert {"image", "text"} == {step.modality for step in steps}
    return [step.gradients for step in steps], [step.modality for step in steps]


def run_ranks(tmp_path, ranks, base, *overrides, options=()):
    out = tmp_path / f"gradients-{ranks}.pt"
    program = ["tests/programs/train_on_ranks.py", *options, out, *base, f"run.dir={tmp_path / 'run'}", *overrides]
    finish(fork_ranks(ranks, program))
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (1, 2)])
def test_an_infinite_loss_on_one_rank_skips_the_update_on_all_ranks(tmp_path, base, ranks, stage):
    overrides = ["checkpoint.every_steps=1", f"engine.ds_config={CONFIGS[stage]}"]
    result = run_ranks(tmp_path, ranks, base, *overrides, options=["--infinite-loss=1", "--until=3"])
    assert [math.isfinite(report["text"]) for report in result["reports"]] == [True, False, True]
    folders = [tmp_path / "run/checkpoints" / folder_name(step) for step in (1, 2, 3)]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        first, second, third = (Layout.load(folder).assemble(folder, kind) for folder in folders)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        assert not all(torch.equal(tensor, third[name]) for name, tensor in first.items())
        assert all(tensor.isfinite().all() for tensor in third.values())


def assert_same_gradients(actual, expected, modalities, first=0):
    """Compare tensor by tensor. Gradients of the first step differ by rounding, which Adam amplifies in later steps."""
    steps = range(first, len(expected))
    for step, ours, reference in zip(steps, actual, expected[first:], strict=True):
        whole = torch.cat([g.flatten() for g in reference.values()]).norm()
        own_share, floor = (1e-4, 1e-7) if step == 0 else (2e-2, 1e-5)
        for name, gradient in reference.items():
            error = (ours[name] - gradient).norm()
            assert error <= own_share * gradient.norm() + floor * whole, f"step {step}, {name}: off by {error:.1e}"
            if modalities[step] == "text" and name.startswith(ALIGNMENT_ONLY):
                assert not ours[name].any(), f"step {step}: {name} has a stale gradient"


SPLITS = [(1, 8, 3), (1, 4, 3), (1, 2, 3), (2, 4, 3), (2, 1, 3), (2, 2, 2)]


@pytest.mark.parametrize(("ranks", "micro_batch", "stage"), SPLITS)
def test_gradients_of_any_batch_split_equal_those_of_one_plain_torch_batch(
    tmp_path, base, reference, ranks, micro_batch, stage
):
    gradients, modalities = reference
    split = [f"optim.micro_batch={micro_batch}", f"engine.ds_config={CONFIGS[stage]}", "engine.segment_layers=2"]
    result = run_ranks(tmp_path, ranks, base, *split)
    assert_same_gradients(result["gradients"], gradients, modalities)


def test_a_text_only_step_right_after_a_resume_has_no_stale_gradients(tmp_path, base, reference):
    gradients, modalities = reference
    before_text = modalities.index("text", 1)
    save_there = f"checkpoint.every_steps={before_text}"
    run_ranks(tmp_path, 2, base, save_there)
    for later in (tmp_path / "run/checkpoints").glob(f"step-*[!{before_text}]"):
        (later / "manifest.json").unlink()
    resumed = run_ranks(tmp_path, 2, base, save_there)
    assert resumed["first"] == before_text
    assert_same_gradients(resumed["gradients"], gradients, modalities, first=before_text)


def test_a_single_all_reduce_combines_losses_requests_and_timings(monkeypatch):
    other_rank = torch.tensor([3, 4, 3, 0, 1, 0, 0, 0, 0, 0.4, 0.5, 0.6], dtype=torch.float64)
    calls = []

    def all_reduce(values):
        calls.append(values)
        values += other_rank

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    sums = torch.tensor([1, 2, 1], dtype=torch.float64)
    totals = Totals(text=2, images=3)
    losses = LossSums(sums=sums, totals=totals, align_weight=0.5, has_align=True, grad_norm=7.0)
    own = Timings(data_wait_s=0.1, towers_s=0.2, gc_s=0.3)
    report = reduce_step(losses, Requests(stop=True), own)
    assert len(calls) == 1
    assert (report.text, report.align, report.total, report.grad_norm) == (2.0, 2.0, 3.0, 7.0)
    assert report.text_by_source.tolist() == [4.0]
    assert report.requests == Requests(stop=True, save=True)
    assert report.timings == [own, Timings(data_wait_s=0.4, towers_s=0.5, gc_s=0.6)]
