"""Recipes: loading and its errors, and the fingerprint that decides whether a checkpoint can be resumed."""

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from model.config import AlignmentConfig
from model.errors import UserError
from model.presets import PRESETS, preset
from pipeline.checkpoint.manifest import Identity, check_identity
from pipeline.config import LossConfig
from pipeline.recipe import Recipe, load_recipe, recipe_of_run
from preprocess.strict_toml import UNSET

RECIPES = Path(__file__).parents[1] / "pipeline" / "recipes"
OLD_RUN = Path(__file__).parent / "fixtures/v0_1/run"
GIVEN = ["data.shards=/data/shards", "run.dir=/runs/x"]


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "try.toml"
    path.write_text(
        'model = "tiny_v2"\n[data]\nshards = "/s"\n[optim]\nlr = 1e-3\nglobal_batch = 8\n[run]\ndir = "/r"\n'
    )
    return path


def test_command_line_overrides_win_over_the_recipe_file_which_wins_over_defaults(recipe_file):
    recipe = load_recipe(recipe_file, ["optim.lr=5e-4", "data.shards=/else where", "steps=3"])
    assert recipe.optim.lr == 5e-4
    assert recipe.data.shards == "/else where"
    assert recipe.steps == 3
    assert recipe.optim.global_batch == 8
    assert recipe.optim.clip == 1.0


@pytest.mark.parametrize(
    "text", ["20240501", "2024-05-01", "3", "true", "1e5", "inf", "nan", "0x10", "[1]", "{}", "3 # x", "12:30", "a=1"]
)
def test_the_text_of_an_override_is_taken_as_it_is_where_the_key_holds_text(recipe_file, text):
    keys = ("run.dir", "data.shards", "data.tokenizer", "evaluate.shards", "weights.llm", "log.project")
    recipe = load_recipe(recipe_file, [f"{key}={text}" for key in keys])
    assert {str(asdict(recipe)[section][key]) for section, key in (name.split(".") for name in keys)} == {text}
    assert all(isinstance(value, str) for value in (recipe.run.dir, recipe.data.tokenizer, recipe.weights.llm))


def test_an_override_in_quotes_is_text_without_the_quotes_and_null_is_no_value(recipe_file):
    assert load_recipe(recipe_file, ["run.dir='3'", 'data.shards="a b"']).data.shards == "a b"
    assert load_recipe(recipe_file, ["run.dir='3'"]).run.dir == "3"
    assert load_recipe(recipe_file, ["data.tokenizer=3", "data.tokenizer=null"]).data.tokenizer is None


def test_an_override_can_set_a_whole_section_and_later_ones_can_change_its_keys(recipe_file):
    recipe = load_recipe(recipe_file, ['data={shards = "/t", epochs = 5}', "data.epochs=3", "data.tokenizer=7"])
    assert (recipe.data.shards, recipe.data.epochs, recipe.data.tokenizer) == ("/t", 3, "7")


MISTAKES = [
    (["optim.lrr=1"], [": unknown key 'optim.lrr', did you mean 'optim.lr'; valid keys here: betas, clip, eps, "]),
    (["optmi.lr=1"], [": unknown key 'optmi', did you mean 'optim'; valid keys here: checkpoint, data, engine, "]),
    (["optim.lr=fast"], [": optim.lr: found 'fast', expected float"]),
    (["optim.lr=true"], [": optim.lr: found True, expected float"]),
    (["data.epochs=1.5"], [": data.epochs: found 1.5, expected int"]),
    (["optim.micro_batch=0"], [": optim.micro_batch: found 0, expected at least 1"]),
    (["optim.betas=[2.0, 0.9]"], [": optim.betas: found 2.0, expected at least 0 and at most 0.999999"]),
    (["steps=0"], [": steps: found 0, expected at least 1"]),
    (["watchdog.first_s=0"], [": watchdog.first_s: found 0.0, expected at least 1"]),
    (["engine.device=tpu"], [": engine.device: found 'tpu', expected one of 'auto', 'cpu', 'cuda'"]),
    (["model=tiny_v3"], ["no model preset 'tiny_v3'", "tiny_v2"]),
    (["optim=3"], [": optim: found 3, expected a table of keys"]),
    (["optim.betas=[0.9]"], [": optim.betas: found [0.9], expected a list of 2 float"]),
    (["optim.betas=[true, 0.9]"], [": optim.betas: found [True, 0.9], expected a list of 2 float"]),
    (["data={shards=3}"], [": data.shards: found 3, expected str, in quotes"]),
    (["engine.device=1"], [": engine.device: found '1', expected one of 'auto', 'cpu', 'cuda'"]),
    (["run.dir="], ["run.dir is empty"]),
    (["data.shards=''"], ["data.shards is empty"]),
    (["engine.ds_config= "], ["engine.ds_config is empty"]),
    (["weights.llm="], ["weights.llm is empty", "leave it out"]),
    (["model="], ["model is empty"]),
    (["engine.memory_gib=30", "engine.segment_layers=0"], ["engine.memory_gib has no effect"]),
    (["justakey"], ["write key=value"]),
    (["model.name=x"], ["'model' is a value, not a section"]),
]


@pytest.mark.parametrize(("overrides", "parts"), MISTAKES, ids=[overrides[0] for overrides, _ in MISTAKES])
def test_the_error_for_an_invalid_override_names_the_key_and_the_expected_value(recipe_file, overrides, parts):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, overrides)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rest", "name"), [('[data]\nshards = "/s"\n', "run.dir"), ("", "data.shards")])
def test_the_error_for_a_missing_required_key_names_the_key(tmp_path, rest, name):
    path = tmp_path / "bare.toml"
    path.write_text('model = "tiny_v2"\n' + rest)
    with pytest.raises(UserError, match=rf"{name} is not set; put it into the recipe or add {name}=… to the command"):
        load_recipe(path)


def test_loading_for_planning_leaves_a_missing_run_folder_and_shards_unset(recipe_file, tmp_path):
    assert load_recipe(recipe_file, planning=True).data.shards == "/s"
    (tmp_path / "bare.toml").write_text('model = "tiny_v2"\n')
    recipe = load_recipe(tmp_path / "bare.toml", planning=True)
    assert recipe.model == "tiny_v2"
    assert recipe.data.shards is UNSET and recipe.run.dir is UNSET
    assert asdict(recipe)["run"]["dir"] is UNSET


def test_invalid_toml_and_a_missing_recipe_file_are_user_errors(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("model = \n")
    with pytest.raises(UserError, match="line 1"):
        load_recipe(path)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(path, GIVEN)
    assert recipe.optim.global_batch % recipe.optim.micro_batch == 0


def test_recipe_of_run_restores_the_recipe_from_the_run_folder(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["loss.align_weight=2"])
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    assert recipe_of_run(tmp_path) == recipe
    assert recipe.align_weight == 2.0


# -- Identity ----------------------------------------------------------------------------------------------------------


def test_only_settings_that_affect_training_results_change_the_fingerprint(recipe_file):
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


FINGERPRINTS = {  # if one of them changes, existing runs can no longer resume
    "emma_v1": "778f329e9383a1555766b2aa7ef1b8ffdcd7c8749c4b4335f6f25b939d2d42c0",
    "emma_v2": "2c4ea9d2daae1d0b67e4e383231a108d4f8bc8d33cd9814246215e4b7a95be85",
    "tiny_v2": "96c3d6e309a429e26f6a9f77a37d06bc69fc50c77a31d31de89b79c675bc99ec",
}


@pytest.mark.parametrize("model", FINGERPRINTS)
def test_default_recipes_still_have_their_recorded_fingerprints(tmp_path, model):
    (tmp_path / "bare.toml").write_text(f'model = "{model}"\n')
    assert load_recipe(tmp_path / "bare.toml", planning=True).fingerprint() == FINGERPRINTS[model]


@pytest.fixture
def old_run(monkeypatch):
    """Return the recipe and the checkpoint manifest of a run of the first version of this project."""
    from tests.support import micro_preset

    monkeypatch.setitem(PRESETS, micro_preset.NAME, micro_preset.config())
    manifest = json.loads((OLD_RUN / "checkpoints/step-00000004/manifest.json").read_text())
    return recipe_of_run(OLD_RUN), manifest


def test_a_run_of_the_first_version_loads_with_its_recorded_fingerprint(old_run):
    recipe, manifest = old_run
    assert recipe.identity() == manifest["recipe"]
    assert recipe.fingerprint() == manifest["fingerprint"]
    loaded, old = json.loads(json.dumps(asdict(recipe))), json.loads((OLD_RUN / "recipe.json").read_text())
    assert merged(loaded, old) == loaded, "a value of the old recipe was changed; only new keys may be added"


@dataclass(frozen=True, kw_only=True)
class NewLossConfig(LossConfig):
    z_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NewAlignmentConfig(AlignmentConfig):
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    decay: float | None = None
    from_step: int = 0


@dataclass(frozen=True, kw_only=True)
class NewRecipe(Recipe):
    averaging: AveragingConfig = field(default_factory=AveragingConfig)


def shallow(config: Any) -> dict[str, Any]:
    return {key.name: getattr(config, key.name) for key in fields(config)}


def with_new_keys(monkeypatch, old: Recipe, *, z_weight=0.0, dropout=0.0, decay=None) -> Recipe:
    """Return the recipe as a later version with three new keys would load it."""
    config = preset(old.model)
    assert config.alignment is not None
    alignment = NewAlignmentConfig(**shallow(config.alignment), dropout=dropout)
    monkeypatch.setitem(PRESETS, old.model, replace(config, alignment=alignment))
    loss = NewLossConfig(**shallow(old.loss), z_weight=z_weight)
    return NewRecipe(**{**shallow(old), "loss": loss}, averaging=AveragingConfig(decay=decay))


def test_new_recipe_keys_at_their_defaults_do_not_change_the_fingerprint(old_run, monkeypatch):
    old, manifest = old_run
    new = with_new_keys(monkeypatch, old)
    assert new.identity() == manifest["recipe"]
    assert new.fingerprint() == manifest["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "settings", "difference"),
    [
        ({"z_weight": 0.1}, {"loss": {"z_weight": 0.1}}, "loss.z_weight was its default, now 0.1"),
        (
            {"dropout": 0.2},
            {"architecture": {"alignment": {"dropout": 0.2}}},
            "architecture.alignment.dropout was its default, now 0.2",
        ),
        ({"decay": 0.999}, {"averaging": {"decay": 0.999}}, "averaging was its default, now {'decay': 0.999}"),
    ],
)
def test_resuming_an_old_checkpoint_with_a_new_recipe_key_set_is_a_user_error(
    old_run, monkeypatch, changes, settings, difference
):
    old, manifest = old_run
    new = with_new_keys(monkeypatch, old, **changes)
    assert new.identity() == merged(manifest["recipe"], settings)
    assert new.fingerprint() != manifest["fingerprint"]
    with pytest.raises(UserError, match=re.escape(f"saved with other settings: {difference}; use the old settings")):
        check_identity(OLD_RUN, manifest, identity_of(new, manifest))


def test_an_old_checkpoint_resumes_if_new_recipe_keys_have_their_defaults(old_run, monkeypatch):
    old, manifest = old_run
    check_identity(OLD_RUN, manifest, identity_of(with_new_keys(monkeypatch, old), manifest))


def identity_of(recipe: Recipe, manifest: dict[str, Any]) -> Identity:
    return Identity(
        recipe=recipe.identity(),
        fingerprint=recipe.fingerprint(),
        shards_sha256=manifest["shards_sha256"],
        total_steps=manifest["total_steps"],
    )


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return old | {
        key: merged(old.get(key, {}), value) if isinstance(value, dict) else value for key, value in new.items()
    }


def test_an_unknown_key_is_reported_before_a_required_key_that_is_not_set(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "tiny_v2"')
    with pytest.raises(UserError, match=r"unknown key 'optim\.lrr', did you mean 'optim\.lr'"):
        load_recipe(tmp_path / "recipe.toml", ["optim.lrr=1"])
