"""Exported folders in transformers, without this project: logits, token ids, batches, pipelines and saving again."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.emma import Emma
from model.presets import preset
from model.transformers_layout import TokenIds, exported_config, published_name
from model.vision import Towers
from model.weights import PUBLISHED_CODE, TIED, load_model
from tests.support.golden_tokenizer import gpt_neox
from tests.support.published import CHECK, export_tiny, run_without_project, transformers_version, write_expected

PRESETS = ("tiny_v1", "tiny_v2", "tiny_cobra_v2", "tiny_csm")
OLDEST = "5.17.0"  # the oldest version that pyproject.toml allows; the installed version is the newest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("published")
    for name in PRESETS:
        export_tiny(root / name, name)
    write_expected(root / "expected.pt", [root / name for name in PRESETS], gpt_neox())
    return [root / name for name in PRESETS]


@pytest.fixture(scope="session")
def version(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function that installs a version of transformers, in a folder that later test runs use again."""
    cache = request.config.cache
    assert cache is not None
    return lambda number: transformers_version(number, cache.mkdir("transformers"))


@pytest.mark.parametrize("number", [OLDEST, None], ids=["oldest", "installed"])
def test_transformers_computes_what_this_project_computes(folders, version, number, tmp_path):
    transformers = number and version(number)
    done = run_without_project(
        CHECK, folders[0].parent / "expected.pt", *folders, scratch=tmp_path, transformers=transformers
    )
    assert_ok(done)
    assert done.stdout.count(f"equal in transformers {number or ''}") == len(folders)
    for folder in folders:
        assert_equal_tensors(folder, folder / "again")


def assert_ok(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_tensors(folder: Path, again: Path) -> None:
    """Check that this project loads a folder that transformers saved again, with equal tensors."""
    one, other = load_model(folder), load_model(again)
    assert one.config == other.config
    for part, same in ((one.emma, other.emma), (one.towers, other.towers)):
        assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in part.state_dict().items())


SHAPES = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForImageTextToText
folder = Path(sys.argv[1])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
with torch.device("meta"):
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
(folder / "shapes.json").write_text(json.dumps(shapes))
"""


@pytest.mark.parametrize("name", ["emma_v1", "emma_v2", "csm"])
def test_full_size_models_have_the_same_tensors_in_transformers(name, tmp_path):
    config = preset(name)
    with torch.device("meta"):
        emma, towers = Emma(config), Towers(config.vision)
    described = exported_config(config, towers, TokenIds(image=50277), dtype=torch.bfloat16, extra={})
    (tmp_path / "config.json").write_text(json.dumps(described))
    for code in PUBLISHED_CODE.glob("*_emma.py"):
        (tmp_path / code.name).write_text(code.read_text())
    assert_ok(run_without_project(SHAPES, tmp_path, scratch=tmp_path, transformers=None))
    found = json.loads((tmp_path / "shapes.json").read_text())
    found.pop("language_model.lm_head.weight")
    ours = {**emma.state_dict(), **towers.state_dict()}
    kept = {name: tensor for name, tensor in ours.items() if name != TIED and not name.startswith("alignment.")}
    assert found == {published_name(name): list(tensor.shape) for name, tensor in kept.items()}
