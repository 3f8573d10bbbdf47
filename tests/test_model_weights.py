"""Saving and loading models, and loading published language models in each file layout."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import config_from_dict
from model.emma import Emma
from model.errors import UserError
from model.presets import PRESETS, preset
from model.transformers_layout import our_name
from model.vision import Towers
from model.weights import TIED, load_language_model, load_model, save_model, weights_sha256


def make(name: str, seed: int = 0) -> tuple[Emma, Towers]:
    torch.manual_seed(seed)
    emma, towers = Emma(preset(name)), Towers(preset(name).vision)
    return emma, towers


def save(folder: Path, name: str = "tiny_v2") -> tuple[Emma, Towers]:
    emma, towers = make(name)
    save_model(
        folder,
        config=emma.config,
        state=emma.state_dict(),
        towers=towers,
        tokenizer_json='{"a": "tokenizer"}',
        extra={"step": 7},
    )
    return emma, towers


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v2", "tiny_cobra", "tiny_csm_v2", "tiny_release"])
def test_a_saved_model_is_loaded_with_equal_tensors(tmp_path: Path, name: str) -> None:
    emma, towers = save(tmp_path, name)
    loaded = load_model(tmp_path)
    assert loaded.config == emma.config and loaded.extra == {"step": 7}
    assert loaded.tokenizer is not None and loaded.tokenizer.read_text() == '{"a": "tokenizer"}'
    for found, expected in ((loaded.emma, emma), (loaded.towers, towers)):
        assert found.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in expected.state_dict().items())
        assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training
    assert loaded.emma.llm.lm_head.weight is loaded.emma.llm.backbone.embedding.weight


def test_save_model_writes_every_tensor_once_and_omits_the_tied_head(tmp_path: Path) -> None:
    emma, towers = save(tmp_path)
    parameters = {name for name, _ in emma.named_parameters()}  # named_parameters lists tied tensors once
    names = [our_name(name) for name in load_file(tmp_path / "model.safetensors")]
    assert len(names) == len(set(names)) and set(names) == parameters | towers.state_dict().keys()


def test_a_model_saved_without_alignment_has_the_same_logits(tmp_path: Path) -> None:
    emma, towers = make("tiny_v2")
    state = {name: tensor for name, tensor in emma.state_dict().items() if not name.startswith("alignment.")}
    save_model(tmp_path, config=emma.config, state=state, towers=towers, tokenizer_json=None, extra={})
    loaded = load_model(tmp_path)
    assert loaded.emma.alignment is None and loaded.tokenizer is None
    tokens, features = torch.randint(0, 1024, (1, 5)), torch.randn(1, 49, 160)
    assert torch.equal(loaded.emma.prefill(tokens, features)[0], emma.prefill(tokens, features)[0])


def test_a_model_is_loaded_in_the_requested_dtype(tmp_path: Path) -> None:
    emma, _ = save(tmp_path)
    loaded = load_model(tmp_path, "cpu", torch.bfloat16)
    assert {tensor.dtype for part in (loaded.emma, loaded.towers) for tensor in part.state_dict().values()} == {
        torch.bfloat16
    }
    weight = emma.llm.backbone.embedding.weight
    assert torch.equal(loaded.emma.llm.backbone.embedding.weight, weight.bfloat16())


def test_one_error_names_every_missing_unexpected_and_misshapen_tensor(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["projector.out.bias"]
    tensors["projector.extra"] = torch.zeros(1)
    tensors["language_model.backbone.norm_f.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    for fact in (
        "missing projector.out.bias [96]",
        "unexpected projector.extra",
        "llm.backbone.norm_f.weight is [3], expected [96]",
    ):
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "not the configuration of a saved model"),
        ("{", "not the configuration of a saved model"),
        ('{"format": 1, "model": {"nmae": 1}}', "not the configuration of a saved model"),
    ],
)
def test_loading_a_folder_without_a_valid_config_is_a_user_error(tmp_path: Path, content: str, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json: {expected}.*pipeline\.export"):
        load_model(tmp_path)


def test_a_folder_of_format_1_still_loads(tmp_path: Path) -> None:
    """Write a folder as version 0.1.0 did: our own tensor names, and the towers in a file of their own."""
    emma, towers = make("tiny_v2")
    state = {name: tensor for name, tensor in emma.state_dict().items() if name != TIED}
    save_file(state, tmp_path / "model.safetensors")
    save_file(towers.state_dict(), tmp_path / "towers.safetensors")
    described = {"format": 1, "model": asdict(preset("tiny_v2")), "extra": {"step": 7}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    loaded = load_model(tmp_path)
    assert (loaded.config, loaded.extra) == (preset("tiny_v2"), {"step": 7})
    for found, expected in ((loaded.emma, emma), (loaded.towers, towers)):
        assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in expected.state_dict().items())
    save(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_loading_a_model_saved_in_another_format_version_is_a_user_error(tmp_path: Path) -> None:
    save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "emma": {**described["emma"], "format": 3}}))
    with pytest.raises(UserError, match="found format 3, expected 2"):
        load_model(tmp_path)


def test_loading_a_truncated_weight_file_is_a_user_error(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable tensor file"):
        load_model(tmp_path)


def test_weights_sha256_identifies_the_content_of_all_weight_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weight files"):
        weights_sha256(tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    one = weights_sha256(tmp_path)
    assert one == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    save_file({"b": torch.zeros(3)}, tmp_path / "towers.safetensors")
    two = weights_sha256(str(tmp_path))
    save_file({"b": torch.ones(3)}, tmp_path / "towers.safetensors")
    assert len({one, two, weights_sha256(tmp_path)}) == 3


def test_saving_again_replaces_an_earlier_model_and_keeps_all_other_files(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_text("mine")
    save(tmp_path)
    for old in ("towers.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / old).write_text("{}")
    save(tmp_path)
    load_model(tmp_path)
    assert (tmp_path / "lora.safetensors").read_text() == "mine"
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {"lora.safetensors", "model.safetensors"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_saving_over_a_file_of_other_origin_is_a_user_error_and_changes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match=f"found {name} of other origin"):
        save(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"model_type": "mamba"}']


def test_an_interrupted_save_cannot_be_loaded_and_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("model.weights.save_tensors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path)
    with pytest.raises(UserError, match="not the configuration of a saved model"):
        load_model(tmp_path)
    save(tmp_path)
    load_model(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(name: str) -> None:
    assert config_from_dict(json.loads(json.dumps(asdict(preset(name))))) == preset(name)


# -- Published language models ---------------------------------------------------------------------------------------


Writer = Callable[[Path, dict[str, Tensor]], list[str]]


def published_state(name: str) -> dict[str, Tensor]:
    """Return a language model state dict as mamba_ssm saves it, which includes the tied head."""
    return {key: tensor.clone() for key, tensor in make(name, seed=1)[0].llm.state_dict().items()}


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict to the transformers layout, which renames the embedding and omits the tied head."""
    renamed = {name.replace("backbone.embedding.", "backbone.embeddings."): tensor for name, tensor in state.items()}
    del renamed["lm_head.weight"]
    return renamed


def write_pytorch(folder: Path, state: dict[str, Tensor]) -> list[str]:
    torch.save(state, folder / "pytorch_model.bin")
    return ["pytorch_model.bin"]


def write_safetensors(folder: Path, state: dict[str, Tensor]) -> list[str]:
    save_file(theirs(state), folder / "model.safetensors")
    return ["model.safetensors"]


def write_shards(folder: Path, state: dict[str, Tensor]) -> list[str]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: names[i % 2] for i, name in enumerate(theirs(state))}
    for shard in names:
        save_file({name: tensor for name, tensor in theirs(state).items() if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return names


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v2"])
@pytest.mark.parametrize("write", [write_pytorch, write_safetensors, write_shards])
def test_a_language_model_loads_from_each_published_layout(tmp_path: Path, write: Writer, name: str) -> None:
    state = published_state(name)
    files = write(tmp_path, state)
    emma, _ = make(name)
    record = load_language_model(emma, tmp_path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in emma.llm.state_dict().items())
    hashes = {str(tmp_path / file): hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in files}
    assert record == {"source": str(tmp_path), "sha256": hashes}


def test_loading_a_language_model_does_not_change_the_other_weights(tmp_path: Path) -> None:
    write_safetensors(tmp_path, published_state("tiny_v2"))
    emma, _ = make("tiny_v2")
    before = {name: tensor.clone() for name, tensor in emma.state_dict().items() if not name.startswith("llm.")}
    load_language_model(emma, tmp_path)
    assert all(torch.equal(emma.state_dict()[name], tensor) for name, tensor in before.items())


def test_loading_a_language_model_of_the_other_mamba_kind_is_a_user_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path, published_state("tiny_v1"))
    with pytest.raises(UserError, match=r"does not fit this model: .*unexpected .*x_proj.*missing .*dt_bias"):
        load_language_model(make("tiny_v2")[0], tmp_path)


def test_the_error_for_an_incomplete_download_names_the_missing_shards(tmp_path: Path) -> None:
    _, last = write_shards(tmp_path, published_state("tiny_v2"))
    (tmp_path / last).unlink()
    with pytest.raises(UserError, match=rf"shards are missing in its folder \({last}\)"):
        load_language_model(make("tiny_v2")[0], tmp_path)


class RunsCode:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_a_pickle_that_could_run_code_is_refused_and_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lm_head.weight": RunsCode()}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin: refused, because this pickle holds objects other than tensors"
    ):
        load_language_model(make("tiny_v2")[0], tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_the_error_for_an_empty_language_model_folder_lists_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no model in this folder; expected one of model\.safetensors, .*pytorch_model\.bin"
    ):
        load_language_model(make("tiny_v2")[0], tmp_path)


def test_the_error_for_an_unreachable_hub_model_names_pipeline_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'nobody/nothing': not a folder, and cannot be downloaded .*pipeline\.prefetch"
    ):
        load_language_model(make("tiny_v2")[0], "nobody/nothing")
