"""The update is that of one torch batch, however the batch is split, and whichever modality came before.

The oracle is plain torch on one process: the whole global batch in one forward pass, `loss.backward()`, AdamW.
"""

import pytest
import torch

from pipeline.data import TrainData
from pipeline.engine import learning_rate, parameter_groups
from pipeline.pretrained import initial_model
from pipeline.ranks import Ranks
from pipeline.recipe import load_recipe
from pipeline.step import row_losses, step_totals
from tests.conftest import finish, torchrun

STEPS = 6  # of one epoch: pictures and text alone, and an incomplete last batch of both
ALIGNMENT_ONLY = ("alignment.", "projector.")


@pytest.fixture(scope="module")
def base(recipe_file, shards):
    return [recipe_file, f"data.shards={shards}", f"steps={STEPS}"]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """{name: gradient} of each step, and the recipe's batches, by plain torch."""
    recipe = load_recipe(base[0], [*base[1:], "optim.micro_batch=8", f"run.dir={tmp_path_factory.mktemp('none')}"])
    data = TrainData(recipe, Ranks(0, 0, 1, torch.device("cpu")))
    emma, towers, _ = initial_model(recipe)
    optimizer = torch.optim.AdamW(parameter_groups(emma, recipe.optim.weight_decay), recipe.optim.lr)
    gradients, modalities = [], []
    for batch in data.from_step(0):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, batch.step, STEPS)
        [micro_batch] = batch.micro_batches
        totals = step_totals(recipe, batch)
        text, align = row_losses(emma, towers, recipe, micro_batch)
        optimizer.zero_grad(set_to_none=False)
        (text.sum() / totals.text + recipe.align_weight * align.sum() / totals.images).backward()
        gradients.append({name: _gradient(p) for name, p in emma.named_parameters()})
        modalities.append("picture" if batch.images else "text")
        torch.nn.utils.clip_grad_norm_(emma.parameters(), recipe.optim.clip)
        optimizer.step()
    assert {"picture", "text"} == set(modalities)
    return gradients, modalities


def _gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def run_ranks(tmp_path, ranks, base, *overrides):
    out = tmp_path / f"gradients-{ranks}.pt"
    program = ["tests/rank_program.py", out, *base, f"run.dir={tmp_path / 'run'}", *overrides]
    finish(torchrun(ranks, program))
    return torch.load(out, weights_only=False)


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
    configs = {3: "ds_configs/zero3_small.json", 2: "ds_configs/zero2.json"}
    split = [f"optim.micro_batch={micro_batch}", f"engine.ds_config={configs[stage]}", "engine.segment_layers=2"]
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
