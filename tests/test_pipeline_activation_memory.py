"""Memory budgets: how many layers keep their activations, and that training results do not change."""

import re

import torch

from pipeline.checkpoint.folder import folder_name
from pipeline.checkpoint.layout import full_state
from tests.support.launch import REPOSITORY, fork_python

STEPS = 3


def number(pattern, text):
    match = re.search(pattern, text)
    assert match, text
    return float(match[1])


def dry_run(recipe_file, budget):
    words = [recipe_file, "engine.segment_layers=2", f"engine.memory_gib={budget}", "--ranks", "1"]
    return fork_python("-m", "pipeline.dry_run", *words, "--micro-batches", "4")


def test_a_larger_memory_budget_recomputes_fewer_layers_and_bounds_the_peak(recipe_file):
    refused = dry_run(recipe_file, 0.001)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    least = number(r"longest batch takes ([\d.]+) GiB with every layer recomputed", refused.stderr)
    assert 0.001 < least < 1

    everything = dry_run(recipe_file, 1).stdout
    assert "no layer is recomputed, 6 keep" in everything
    most = number(r"peak ([\d.]+) of", everything)

    budget = (least + most) / 2
    between = dry_run(recipe_file, budget).stdout
    last_recomputed, kept = number(r"layers 0 to (\d) are", between), number(r"recomputed, (\d) keep", between)
    assert last_recomputed + 1 + kept == 6
    assert least < number(r"peak ([\d.]+) of", between) <= budget


def test_under_zero_2_measuring_peak_memory_does_not_change_the_trained_state(recipe_file, shards, tmp_path):
    """A run with a memory budget must end with the weights of a run without one. test_pipeline_train tests ZeRO-3."""
    config = f"engine.ds_config={REPOSITORY}/ds_configs/zero2.json"
    words = [recipe_file, f"data.shards={shards}", f"steps={STEPS}", config, "optim.micro_batch=2"]
    states = []
    for name, *overrides in (["plain"], ["budget", "engine.segment_layers=2", "engine.memory_gib=1"]):
        done = fork_python("-m", "pipeline.train", *words, f"run.dir={tmp_path / name}", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        states.append(full_state(tmp_path / name / "checkpoints" / folder_name(STEPS)))
    assert "6 keep" in done.stdout
    plain, budget = states
    assert plain.keys() == budget.keys()
    assert all(torch.equal(plain[name], budget[name]) for name in plain)
