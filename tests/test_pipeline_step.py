"""The update is that of one torch batch, however the batch is split, and whichever modality came before."""

import math

import pytest
import torch

from pipeline.checkpoint.folder import folder_name
from pipeline.checkpoint.layout import Layout
from pipeline.recipe import load_recipe
from tests.support.launch import finish, fork_ranks
from tests.support.plain_torch import train_plainly

STEPS = 6  # of one epoch: pictures and text alone, and an incomplete last batch of both
CONFIGS = {3: "ds_configs/zero3_small.json", 2: "ds_configs/zero2.json"}
ALIGNMENT_ONLY = ("alignment.", "projector.")


@pytest.fixture(scope="module")
def base(recipe_file, shards):
    return [recipe_file, f"data.shards={shards}", f"steps={STEPS}"]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """The gradients of each step by plain torch, and the modalities of the steps."""
    whole = [*base[1:], "optim.micro_batch=8", f"run.dir={tmp_path_factory.mktemp('none')}"]
    steps = train_plainly(load_recipe(base[0], whole))
    assert {"picture", "text"} == {step.modality for step in steps}
    return [step.gradients for step in steps], [step.modality for step in steps]


def run_ranks(tmp_path, ranks, base, *overrides, options=()):
    out = tmp_path / f"gradients-{ranks}.pt"
    program = ["tests/programs/train_on_ranks.py", *options, out, *base, f"run.dir={tmp_path / 'run'}", *overrides]
    finish(fork_ranks(ranks, program))
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (1, 2)])
def test_an_infinite_loss_with_finite_gradients_on_one_rank_updates_nothing_on_any(tmp_path, base, ranks, stage):
    overrides = ["checkpoint.every_steps=1", f"engine.ds_config={CONFIGS[stage]}"]
    told = run_ranks(tmp_path, ranks, base, *overrides, options=["--infinite-loss=1", "--until=3"])
    assert [math.isfinite(report["text"]) for report in told["reports"]] == [True, False, True]
    folders = [tmp_path / "run/checkpoints" / folder_name(step) for step in (1, 2, 3)]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        first, second, third = (Layout.load(folder).assemble(folder, kind) for folder in folders)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        assert not all(torch.equal(tensor, third[name]) for name, tensor in first.items())
        assert all(tensor.isfinite().all() for tensor in third.values())


def assert_same_gradients(found, expected, modalities, first=0):
    """Tensor by tensor: to fp32 rounding in the first step, and later to what Adam makes of that rounding."""
    steps = range(first, len(expected))
    for step, ours, oracle in zip(steps, found, expected[first:], strict=True):
        whole = torch.cat([g.flatten() for g in oracle.values()]).norm()
        own_share, floor = (1e-4, 1e-7) if step == 0 else (2e-2, 1e-5)
        for name, gradient in oracle.items():
            off = (ours[name] - gradient).norm()
            assert off <= own_share * gradient.norm() + floor * whole, f"step {step}, {name}: off by {off:.1e}"
            if modalities[step] == "text" and name.startswith(ALIGNMENT_ONLY):
                assert not ours[name].any(), f"step {step}: {name} kept a stale gradient"


SPLITS = [(1, 8, 3), (1, 4, 3), (1, 2, 3), (2, 4, 3), (2, 1, 3), (2, 2, 2)]


@pytest.mark.parametrize(("ranks", "micro_batch", "stage"), SPLITS)
def test_gradients_are_those_of_one_torch_batch_however_it_is_split(
    tmp_path, base, reference, ranks, micro_batch, stage
):
    gradients, modalities = reference
    split = [f"optim.micro_batch={micro_batch}", f"engine.ds_config={CONFIGS[stage]}", "engine.segment_layers=2"]
    found = run_ranks(tmp_path, ranks, base, *split)
    assert_same_gradients(found["gradients"], gradients, modalities)


def test_a_text_only_step_after_a_resume_has_no_stale_gradient_either(tmp_path, base, reference):
    gradients, modalities = reference
    before_text = modalities.index("text", 1)
    save_there = f"checkpoint.every_steps={before_text}"
    run_ranks(tmp_path, 2, base, save_there)
    for later in (tmp_path / "run/checkpoints").glob(f"step-*[!{before_text}]"):
        (later / "manifest.json").unlink()
    resumed = run_ranks(tmp_path, 2, base, save_there)
    assert resumed["first"] == before_text
    assert_same_gradients(resumed["gradients"], gradients, modalities, first=before_text)
