"""Exported folders in transformers, without this project: logits, token ids, batches, pipelines and saving again."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.emma import Emma
from model.language_model import MambaLM
from model.presets import preset
from model.transformers_layout import TokenIds, exported_config, published_name, save_language_model
from model.vision import Towers
from model.weights import PUBLISHED_CODE, TIED, load_model
from pipeline.publishing.tokenizer_files import language_model_files, token_ids
from preprocess.prompts import load_tokenizer
from tests.support.golden_tokenizer import gpt_neox
from tests.support.published import CHECK, export_tiny, run_without_project, transformers_version, write_expected
from tests.support.tiny_data import write_byte_tokenizer

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


# -- The language model alone ------------------------------------------------------------------------------------------


LANGUAGE_MODEL = """
import sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
expected = torch.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.encode("Which colour is it?")
    assert ids == expected["ids"], ids
    found = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    torch.testing.assert_close(found, expected[folder.name], rtol=1e-4, atol=1e-4)
    eos = [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id]
    pad = [tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id]
    assert (eos, pad) == ([2] * 3, [3] * 3), (eos, pad)
    assert tokenizer.decode([2, ids[0]], skip_special_tokens=True) == tokenizer.decode(ids[:1])
print("equal in transformers", transformers.__version__)
"""


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Export both kinds of language model with a tokenizer that ends texts with `</s>`, and write expected logits."""
    root = tmp_path_factory.mktemp("language_models")
    tokenizer = load_tokenizer(write_byte_tokenizer(root / "tokenizer", specials=("<unk>", "<s>", "</s>", "<pad>")))
    files, ids = language_model_files(tokenizer, preset("tiny_v2")), token_ids(tokenizer)
    tokens = tokenizer.encode("Which colour is it?")
    expected: dict[str, object] = {"ids": tokens}
    for name in ("tiny_v1", "tiny_v2"):
        torch.manual_seed(0)
        config = preset(name)
        llm = MambaLM(config.llm)
        save_language_model(root / name, config.llm, llm.state_dict(), ids=ids, files=files)
        with torch.no_grad():
            expected[name] = llm.head(llm(llm.embed(torch.tensor([tokens])))[0])
    torch.save(expected, root / "expected.pt")
    return [root / name for name in ("tiny_v1", "tiny_v2")]


@pytest.mark.parametrize("number", ["4.57.6", None], ids=["4.57", "installed"])
def test_the_exported_language_model_is_equal_in_transformers_4_and_5(language_models, version, number, tmp_path):
    expected = language_models[0].parent / "expected.pt"
    transformers = number and version(number)
    done = run_without_project(LANGUAGE_MODEL, expected, *language_models, scratch=tmp_path, transformers=transformers)
    assert_ok(done)
    assert f"equal in transformers {number or '5.'}" in done.stdout
    config = json.loads((language_models[1] / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, float("inf")]
