"""Recipes are strict, typed, and say what is wrong."""

import json
from pathlib import Path

import pytest

from model.errors import UserError
from pipeline.recipe import load_recipe, recipe_of_run

RECIPES = Path(__file__).parents[1] / "pipeline" / "recipes"
GIVEN = ["data.shards=/data/shards", "run.dir=/runs/x"]


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "try.toml"
    path.write_text(
        'model = "tiny_v2"\n[data]\nshards = "/s"\n[optim]\nlr = 1e-3\nglobal_batch = 8\n[run]\ndir = "/r"\n'
    )
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(recipe_file):
    recipe = load_recipe(recipe_file, ["optim.lr=5e-4", "data.shards=/else where", "steps=3"])
    assert recipe.optim.lr == 5e-4
    assert recipe.data.shards == "/else where"
    assert recipe.steps == 3
    assert recipe.optim.global_batch == 8
    assert recipe.optim.clip == 1.0


MISTAKES = [
    (["optim.lrr=1"], ["optim", "'lrr'", "did you mean 'lr'"]),
    (["optmi.lr=1"], ["'optmi'", "did you mean 'optim'"]),
    (["optim.lr=fast"], ["optim: lr", "'fast'", "expected float"]),
    (["optim.micro_batch=0"], ["optim.micro_batch", "at least 1"]),
    (["optim.betas=[2.0, 0.9]"], ["optim.betas", "found 2.0", "at most 0.999999"]),
    (["steps=0"], ["steps", "at least 1"]),
    (["watchdog.first_s=0"], ["watchdog.first_s", "at least 1"]),
    (["engine.device=tpu"], ["engine: device", "'tpu'", "'cpu'"]),
    (["model=tiny_v3"], ["no model preset 'tiny_v3'", "tiny_v2"]),
    (["optim=3"], ["optim", "expected a table"]),
    (["optim.betas=[0.9]"], ["betas"]),
    (["run.dir="], ["run.dir is empty"]),
    (["data.shards=''"], ["data.shards is empty"]),
    (["engine.ds_config= "], ["engine.ds_config is empty"]),
    (["weights.llm="], ["weights.llm is empty", "leave it out"]),
    (["model="], ["model is empty"]),
    (["justakey"], ["write key=value"]),
    (["model.name=x"], ["'model' holds a value"]),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[overrides[0] for overrides, _ in MISTAKES])
def test_a_mistake_is_answered_with_its_place_and_what_was_expected(recipe_file, overrides, said):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, overrides)
    for words in said:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unset_run_folder_is_asked_for(tmp_path):
    path = tmp_path / "bare.toml"
    path.write_text('model = "tiny_v2"\n[data]\nshards = "/s"\n')
    with pytest.raises(UserError, match=r"run\.dir is not set"):
        load_recipe(path)


def test_planning_needs_neither_shards_nor_a_run_folder_and_keeps_those_that_are_named(recipe_file, tmp_path):
    assert load_recipe(recipe_file, planning=True).data.shards == "/s"
    (tmp_path / "bare.toml").write_text('model = "tiny_v2"\n')
    assert load_recipe(tmp_path / "bare.toml", planning=True).model == "tiny_v2"


def test_broken_toml_and_a_missing_file_are_user_errors(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("model = \n")
    with pytest.raises(UserError, match="line 1"):
        load_recipe(path)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads(path):
    recipe = load_recipe(path, GIVEN)
    assert recipe.optim.global_batch % recipe.optim.micro_batch == 0


def test_only_settings_that_change_the_training_change_its_fingerprint(recipe_file):
    base = load_recipe(recipe_file).fingerprint()
    same = ["log.every_steps=1", "checkpoint.keep_last=9", "run.dir=/else", "data.workers=0", "optim.micro_batch=4"]
    same += ["engine.segment_layers=0", "data.shards=/moved"]
    for override in same:
        assert load_recipe(recipe_file, [override]).fingerprint() == base, override
    for override in [
        "optim.lr=2e-3",
        "model=tiny_v1",
        "seed=8",
        "data.window=7",
        "optim.global_batch=16",
        "data.epochs=1",
    ]:
        assert load_recipe(recipe_file, [override]).fingerprint() != base, override


def test_a_run_folder_gives_its_recipe_back(recipe_file, tmp_path):
    from dataclasses import asdict

    recipe = load_recipe(recipe_file, ["loss.align_weight=2"])
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    assert recipe_of_run(tmp_path) == recipe
    assert recipe.align_weight == 2.0
