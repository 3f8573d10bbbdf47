"""Exported folders in transformers, without this project: logits, token ids, batches, pipelines and saving again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.weights import load_model
from preprocess.prompts import load_tokenizer
from tests.support.golden_tokenizer import gpt_neox
from tests.support.published import (
    check_published,
    export_language_model,
    export_shapes,
    export_tiny,
    transformers_version,
    write_expected,
)
from tests.support.tiny_data import write_byte_tokenizer

WHOLE = ("tiny_v1", "tiny_v2", "tiny_cobra_v2", "tiny_csm")
FULL_SIZE = ("emma_v1", "emma_v2", "csm")
LANGUAGE_MODELS = ("language_v1", "language_v2")
OLDEST = "5.17.0"  # the oldest version that pyproject.toml allows; the installed version is the newest
VERSION_4 = "4.57.6"  # the last version before 5; only the language model alone can be loaded with it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all folders, and next to each folder what this project computes with it.

    The tokenizer of the language models ends a text with `</s>`, and its ids differ from those of GPT-NeoX.
    """
    root = tmp_path_factory.mktemp("published")
    for name in WHOLE:
        export_tiny(root / name, name)
        write_expected(root / name, gpt_neox())
    for name in FULL_SIZE:
        export_shapes(root / name, name)
    tokenizer = load_tokenizer(write_byte_tokenizer(root / "tokenizer", specials=("<unk>", "<s>", "</s>", "<pad>")))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 3)
    for name in LANGUAGE_MODELS:
        export_language_model(root / name, name.replace("language", "tiny"), tokenizer)
    return root


@pytest.fixture(scope="module")
def install(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function that installs a version of transformers in a folder that later test runs use again."""
    cache = request.config.cache
    assert cache is not None
    return lambda version: transformers_version(version, cache.mkdir("transformers"))


@pytest.fixture(scope="module")
def installed_version(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what the check of all folders prints with the installed version of transformers."""
    folders = [root / name for name in (*WHOLE, *FULL_SIZE, *LANGUAGE_MODELS)]
    return check_published(*folders, scratch=tmp_path_factory.mktemp("scratch")).stdout


@pytest.mark.parametrize("name", WHOLE)
def test_the_installed_transformers_computes_what_this_project_computes(root, installed_version, name):
    assert f"\n{name}: equal in transformers 5." in f"\n{installed_version}", installed_version
    # This project also loads the folder that transformers saved again.
    ours, again = load_model(root / name), load_model(root / name / "again")
    assert ours.config == again.config
    for part, same in ((ours.emma, again.emma), (ours.towers, again.towers)):
        assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_the_same_tensors_in_transformers(installed_version, name):
    assert f"\n{name}: equal in transformers 5." in f"\n{installed_version}", installed_version


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_an_exported_language_model_is_equal_in_the_installed_transformers(installed_version, name):
    assert f"\n{name}: equal in transformers 5." in f"\n{installed_version}", installed_version


def test_the_oldest_supported_transformers_computes_what_this_project_computes(root, install, tmp_path):
    done = check_published(*(root / name for name in WHOLE), scratch=tmp_path, transformers=install(OLDEST))
    assert done.stdout.count(f"equal in transformers {OLDEST}") == len(WHOLE), done.stdout + done.stderr


def test_exported_language_models_are_equal_in_transformers_4(root, install, tmp_path):
    folders = [root / name for name in LANGUAGE_MODELS]
    done = check_published(*folders, scratch=tmp_path, transformers=install(VERSION_4))
    assert done.stdout.count(f"equal in transformers {VERSION_4}") == len(folders), done.stdout + done.stderr
