"""The planning commands: describe, with parameter counts and costs of the paper's models, and dry_run."""

import json

import pytest

from model.presets import preset
from pipeline.describe import describe, table
from pipeline.dry_run import longest_text
from pipeline.flops import count_parameters, flops_per_sample
from pipeline.recipe import load_recipe
from tests.support.launch import fork_python


@pytest.mark.parametrize(("name", "llm", "trainable"), [("v1", 2_768_345_600, 3.19e9), ("v2", 2_702_599_680, 3.11e9)])
def test_describe_reports_the_papers_parameter_counts_and_steps(name, llm, trainable):
    facts = describe(load_recipe(f"pipeline/recipes/emma_{name}.toml", planning=True), ranks=8, mfu=0.4)
    assert facts["parameters"]["llm"] == llm
    assert facts["parameters"]["trainable"] == pytest.approx(trainable, rel=0.005)
    assert facts["data"]["steps"] == 19_232
    assert 10 < facts["hours"] < 20
    assert f"{llm:,}" in table(facts)


@pytest.mark.parametrize("name", ["emma_v1", "emma_v2"])
def test_training_flops_are_about_six_per_parameter_and_token(name):
    config = preset(name)
    text = 295
    flops = flops_per_sample(config, text, supervised=text, segment_layers=0, keep_layers=0)
    parameters = count_parameters(config)
    tokens = config.vision.num_patches + text
    assert 3 * flops.language == pytest.approx(6 * parameters.llm * tokens, rel=0.15)
    assert flops.recompute == 0
    recomputed = flops_per_sample(config, text, text, segment_layers=4, keep_layers=16).recompute
    assert recomputed == pytest.approx(0.75 * flops.language, rel=0.05)


def test_describe_uses_the_steps_and_lengths_of_existing_shards(recipe_file, shards):
    recipe = load_recipe(recipe_file, [f"data.shards={shards}"], planning=True)
    facts = describe(recipe, ranks=2, mfu=0.4)
    assert facts["data"]["samples"] == 35
    assert facts["data"]["steps"] == 12
    assert longest_text(recipe, default=1) > 20


def test_a_dry_run_reports_which_micro_batches_fit(recipe_file, tmp_path):
    out = tmp_path / "trials.json"
    done = fork_python(
        "-m", "pipeline.dry_run", recipe_file, "--ranks", "2", "--micro-batches", "1", "4", "--json", out
    )
    assert done.returncode == 0, done.stderr
    assert "largest that fits: 4" in done.stdout
    assert [trial["micro_batch"] for trial in json.loads(out.read_text())] == [1, 4]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["emma_v2.toml"], "emma_v2 has 3.1 billion trainable parameters, but torch finds no GPU"),
        (
            ["emma_v1.toml", "engine.device=cpu"],
            "emma_v1 has 3.2 billion trainable parameters, but engine.device is cpu",
        ),
        (["emma_v2.toml", "model=cobra_v2"], "cobra_v2 has 2.8 billion trainable parameters, but torch finds no GPU"),
    ],
)
def test_a_dry_run_at_full_size_without_a_gpu_says_how_to_rehearse(words, found):
    done = fork_python("-m", "pipeline.dry_run", f"pipeline/recipes/{words[0]}", *words[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {found}; run this command on a GPU node")
    assert done.stderr.count("\n") == 1
    advice = done.stderr.rpartition("add ")[2].split()
    assert load_recipe(f"pipeline/recipes/{words[0]}", advice, planning=True).engine.device == "cpu"


@pytest.mark.parametrize(
    "words", [("--ranks", "0"), ("--memory-gib", "-1"), ("--text-tokens", "0"), ("--micro-batches", "4", "0")]
)
def test_a_dry_run_refuses_numbers_that_are_not_above_zero(recipe_file, words):
    done = fork_python("-m", "pipeline.dry_run", recipe_file, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words[0]}: found ")
    assert done.stderr.count("\n") == 1
