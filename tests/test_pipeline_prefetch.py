"""What a recipe needs is fetched or checked before a GPU is asked for, and a run keeps to its towers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.emma import Emma
from model.errors import UserError
from model.presets import preset
from model.vision import Towers
from pipeline.initial_model import initial_model, make_towers, refuse_other_towers
from pipeline.recipe import load_recipe
from tests.support.launch import fork_python
from tests.support.tiny_data import write_byte_tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Small checkpoints in the published layouts: a language model as mamba_ssm writes it, towers, a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    config = preset("tiny_v2")
    llm = folder / "llm"
    llm.mkdir()
    (llm / "config.json").write_text("{}")
    torch.save(Emma(config).llm.state_dict(), llm / "pytorch_model.bin")
    save_towers(folder / "towers", config, scale=1.0)
    save_towers(folder / "other_towers", config, scale=2.0)
    write_byte_tokenizer(folder / "tokenizer")
    return folder


def save_towers(folder, config, scale):
    folder.mkdir()
    for name, tower in Towers(config.vision).towers.items():
        save_file(
            {key: (scale * value).contiguous() for key, value in tower.vit.state_dict().items()},
            folder / f"{name}.safetensors",
        )


def words(recipe_file, published, towers="towers"):
    sources = [f"weights.llm={published / 'llm'}", f"weights.towers={published / towers}"]
    return [recipe_file, *sources, f"data.tokenizer={published / 'tokenizer'}"]


def test_what_is_there_is_listed_with_its_size(recipe_file, published):
    done = fork_python("-m", "pipeline.prefetch", *words(recipe_file, published))
    assert done.returncode == 0, done.stderr
    for said in ("language model", "towers", "258 entries", "everything is here"):
        assert said in done.stdout


def test_all_that_is_missing_is_named_at_once_and_a_model_of_another_size_is_found(recipe_file, published, tmp_path):
    wrong = [*words(recipe_file, published), "model=tiny_v1", f"weights.towers={tmp_path}", "data.tokenizer=/no/where"]
    llm = tmp_path / "llm"
    llm.mkdir()
    save_file({"backbone.embeddings.weight": torch.zeros(7, 2)}, llm / "model.safetensors")
    done = fork_python("-m", "pipeline.prefetch", *wrong, f"weights.llm={llm}")
    assert done.returncode == 2
    for said in ("3 of 3 parts", "an embedding of 7 rows", "no weights of tower dinov2", "/no/where"):
        assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_pretrained_parts_are_put_in_and_recorded(recipe_file, published):
    recipe = load_recipe(recipe_file, [str(word) for word in words(recipe_file, published)[1:3]], planning=True)
    emma, towers, loaded = initial_model(recipe)
    saved = torch.load(published / "llm/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in emma.llm.state_dict().items())
    assert len(loaded["towers"]) == len(towers.towers)
    assert loaded["llm"]["source"] == str(published / "llm")


def test_a_run_keeps_to_the_towers_that_it_began_with(recipe_file, published, tmp_path):
    given = ["weights.llm=random"]
    first, other = (
        load_recipe(recipe_file, [*given, f"weights.towers={published / name}"], planning=True)
        for name in ("towers", "other_towers")
    )
    assert first.fingerprint() == other.fingerprint(), "a folder may move"
    record = tmp_path / "weights.json"
    refuse_other_towers(record, make_towers(other))
    record.write_text(json.dumps({"llm": "random", "towers": make_towers(first).loaded}))
    refuse_other_towers(record, make_towers(first))
    with pytest.raises(UserError, match="not those that the run began with"):
        refuse_other_towers(record, make_towers(other))
