"""Prefetching and loading of pretrained parts, and the check that a resumed run uses the same vision towers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.emma import Emma
from model.errors import UserError
from model.presets import preset
from model.vision import Towers
from pipeline.initial_model import check_towers_unchanged, initial_model, make_towers
from pipeline.recipe import load_recipe
from tests.support.launch import fork_python
from tests.support.tiny_data import write_byte_tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write small pretrained parts in their published layouts: a language model, vision towers and a tokenizer."""
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


def test_prefetch_lists_all_parts_when_they_are_available(recipe_file, published):
    done = fork_python("-m", "pipeline.prefetch", *words(recipe_file, published))
    assert done.returncode == 0, done.stderr
    for text in ("language model", "towers", "258 entries", "parts of the model are available locally"):
        assert text in done.stdout


def test_prefetch_reports_all_missing_and_mismatched_parts_at_once(recipe_file, published, tmp_path):
    wrong = [*words(recipe_file, published), "model=tiny_v1", f"weights.towers={tmp_path}", "data.tokenizer=/no/where"]
    llm = tmp_path / "llm"
    llm.mkdir()
    save_file({"backbone.embeddings.weight": torch.zeros(7, 2)}, llm / "model.safetensors")
    done = fork_python("-m", "pipeline.prefetch", *wrong, f"weights.llm={llm}")
    assert done.returncode == 2
    for text in ("3 of 3 parts", "an embedding of 7 rows", "no weights of tower dinov2", "/no/where"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_the_initial_model_loads_pretrained_parts_and_records_their_sources(recipe_file, published):
    recipe = load_recipe(recipe_file, [str(word) for word in words(recipe_file, published)[1:3]], planning=True)
    emma, towers, loaded = initial_model(recipe)
    saved = torch.load(published / "llm/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in emma.llm.state_dict().items())
    assert len(loaded["towers"]) == len(towers.towers)
    assert loaded["llm"]["source"] == str(published / "llm")


def test_resuming_with_other_vision_towers_is_a_user_error(recipe_file, published, tmp_path):
    given = ["weights.llm=random"]
    first, other = (
        load_recipe(recipe_file, [*given, f"weights.towers={published / name}"], planning=True)
        for name in ("towers", "other_towers")
    )
    assert first.fingerprint() == other.fingerprint(), "the path of the folder must not change the fingerprint"
    record = tmp_path / "weights.json"
    check_towers_unchanged(record, make_towers(other))
    record.write_text(json.dumps({"llm": "random", "towers": make_towers(first).loaded}))
    check_towers_unchanged(record, make_towers(first))
    with pytest.raises(UserError, match="not the files that the run began with"):
        check_towers_unchanged(record, make_towers(other))
