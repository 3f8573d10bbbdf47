"""Runs that start from an exported model (`weights.init`): weights, identity, errors, resuming and exporting."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from model.emma import Emma
from model.errors import UserError
from model.hashing import weights_sha256
from model.presets import preset
from model.vision import Towers
from model.weights import load_model, save_model
from pipeline.export import export_run, export_untrained
from pipeline.initial_model import initial_model
from pipeline.prefetch import required_parts
from pipeline.recipe import load_recipe
from tests.support.launch import REPOSITORY, finish, fork_python, fork_ranks


@pytest.fixture(scope="module")
def start(recipe_file, shards, tmp_path_factory) -> Path:
    """Export the initial model of another seed, as the model to fine-tune."""
    out = tmp_path_factory.mktemp("start") / "model"
    export_untrained(load_recipe(recipe_file, [f"data.shards={shards}", "run.dir=unused", "seed=99"]), out)
    return out


def recipe(recipe_file, *overrides):
    return load_recipe(recipe_file, list(overrides), planning=True)


def save(folder: Path, name: str, *, with_alignment: bool) -> Path:
    torch.manual_seed(5)
    config = preset(name)
    state = Emma(config).state_dict()
    if not with_alignment:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("alignment.")}
    save_model(folder, config=config, state=state, towers=Towers(config.vision), tokenizer_json=None, extra={})
    return folder


@pytest.mark.parametrize("with_alignment", [False, True])
def test_a_run_starts_from_the_exported_weights_and_from_its_decoder_if_any(recipe_file, tmp_path, with_alignment):
    folder = save(tmp_path / "model", "tiny_v2", with_alignment=with_alignment)
    emma, towers, loaded = initial_model(recipe(recipe_file, f"weights.init={folder}"))
    fresh, saved = initial_model(recipe(recipe_file))[0].state_dict(), load_model(folder)
    for name, tensor in emma.state_dict().items():
        from_seed = name.startswith("alignment.") and not with_alignment
        assert torch.equal(tensor, fresh[name] if from_seed else saved.emma.state_dict()[name]), name
    assert all(torch.equal(tensor, saved.towers.state_dict()[name]) for name, tensor in towers.state_dict().items())
    assert loaded["llm"] == {"source": str(folder), "sha256": weights_sha256(folder)}
    assert emma.state_dict().keys() == Emma(preset("tiny_v2")).state_dict().keys()


def test_a_preset_without_alignment_starts_from_a_model_with_a_decoder(recipe_file, tmp_path):
    folder = save(tmp_path / "model", "tiny_v2", with_alignment=True)
    emma, _, _ = initial_model(recipe(recipe_file, "model=tiny_cobra_v2", f"weights.init={folder}"))
    assert torch.equal(emma.projector.out.weight, load_model(folder).emma.projector.out.weight)


def test_the_weights_of_the_initial_model_are_part_of_the_runs_identity(recipe_file, start, tmp_path):
    plain, tuned = recipe(recipe_file), recipe(recipe_file, f"weights.init={start}")
    assert "init" not in plain.identity()
    assert tuned.identity() == {**plain.identity(), "init": weights_sha256(start)}
    shutil.copytree(start, tmp_path / "moved")
    moved = recipe(recipe_file, f"weights.init={tmp_path / 'moved'}")
    assert moved.fingerprint() == tuned.fingerprint() != plain.fingerprint()
    other = save(tmp_path / "other", "tiny_v2", with_alignment=False)
    assert recipe(recipe_file, f"weights.init={other}").fingerprint() != tuned.fingerprint()


@pytest.mark.parametrize(
    ("model", "fact"),
    [
        ("tiny_v1", "llm.kind is different (found mamba2, expected mamba1). Set model to a preset with the archit"),
        ("tiny_csm_v2", "cross_scan is different (found False, expected True)"),
        ("tiny_avf_v2", "alignment is different"),
    ],
)
def test_a_preset_of_another_architecture_is_a_user_error(recipe_file, tmp_path, model, fact):
    folder = save(tmp_path / "model", "tiny_v2", with_alignment=True)
    with pytest.raises(UserError) as caught:
        initial_model(recipe(recipe_file, f"model={model}", f"weights.init={folder}"))
    assert str(caught.value).startswith(f"weights.init: {folder}: does not fit the preset {model!r}: ")
    assert fact in str(caught.value)


def test_prefetch_checks_the_initial_model_and_downloads_no_other_weights(recipe_file, start):
    [(name, source, describe)] = required_parts(recipe(recipe_file, f"weights.init={start}"))
    assert (name, source) == ("initial model", str(start))
    assert describe().endswith("GiB")


def test_weights_init_cannot_be_combined_with_other_weights(recipe_file, start):
    with pytest.raises(UserError, match=r"leave out weights\.llm and weights\.towers"):
        recipe(recipe_file, f"weights.init={start}", "weights.llm=random")


def documented_commands(replacements: dict[str, str]) -> list[list[str]]:
    """Return the commands of docs/fine-tuning.md that start from an exported model, with some words replaced."""
    page = (REPOSITORY / "docs/fine-tuning.md").read_text(encoding="utf-8")
    [block] = re.findall(r"## From a model of yours.*?```sh\n(.*?)```", page, re.DOTALL)
    for old, new in replacements.items():
        assert old in block
        block = block.replace(old, new)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_the_documented_commands_fine_tune_an_exported_model(recipe_file, raw_mix, shards, tmp_path):
    train = [recipe_file, f"data.shards={shards}", f"run.dir={tmp_path / 'runs/v2'}", "steps=2"]
    finish(fork_ranks(1, ["-m", "pipeline.train", *train]))
    tokenizer = f"--tokenizer {raw_mix.parent / 'tokenizer'} --workers 0"
    places = {"my.toml": f"{raw_mix} {tokenizer}", "emma_v2 --root /data/mine": f"tiny_v2 --root {raw_mix.parent}"}
    places |= {"pipeline/recipes/emma_v2.toml": f"{recipe_file} steps=2", "/data/my_shards": str(tmp_path / "shards")}
    places |= {"/runs/": f"{tmp_path}/runs/", "models/": f"{tmp_path}/models/"}
    for words in documented_commands(places):
        done = fork_python(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    before, after = load_model(tmp_path / "models/v2"), load_model(tmp_path / "models/tuned")
    assert before.emma.alignment is not None
    assert after.emma.alignment is None
    distance = (before.emma.projector.out.weight - after.emma.projector.out.weight).abs().max()
    assert 0 < distance < 1e-3, "two steps with a small learning rate change the weights little"
    card = (tmp_path / "models/tuned/README.md").read_text()
    assert f"Training began from the exported model `v2`, sha256 `{weights_sha256(tmp_path / 'models/v2')}`" in card


def test_a_fine_tuned_run_resumes_and_exports_after_its_initial_model_moved(recipe_file, shards, start, tmp_path):
    init, run = tmp_path / "init", tmp_path / "run"
    shutil.copytree(start, init)
    train = ["-m", "pipeline.train", recipe_file, f"data.shards={shards}", f"run.dir={run}", "steps=8"]
    log = finish(fork_ranks(1, [*train, f"weights.init={init}"]))
    assert f"starts from {init}, which has no decoder: the decoder starts untrained" in log
    shutil.rmtree(run / "checkpoints/step-00000008")
    init.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"weights\.init: .*If you moved the initial model, add weights\.init="):
        export_run(run, tmp_path / "tuned")
    assert "resumed at step 4" in finish(fork_ranks(1, [*train, f"weights.init={tmp_path / 'moved'}"]))
    export_run(run, tmp_path / "tuned")
    assert load_model(tmp_path / "tuned").config == load_model(start).config


def test_shards_of_another_tokenizer_than_the_initial_models_are_refused(recipe_file, shards, start, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(start, other)
    config = json.loads((other / "config.json").read_text())
    config["emma"]["extra"]["tokenizer_sha256"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    words = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", f"weights.init={other}"]
    log = finish(fork_ranks(1, ["-m", "pipeline.train", recipe_file, *words]), code=None)
    assert "error: data.shards: " in log
    assert "built with another tokenizer (tokenizer) than the model of weights.init" in log
