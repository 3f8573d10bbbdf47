"""The export and generate commands: exported weights, prompts, decoding, and errors."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.emma import Emma
from model.errors import UserError
from model.presets import preset
from model.weights import load_model
from pipeline.checkpoint.folder import folder_name
from pipeline.checkpoint.layout import full_state
from pipeline.export import check_state, export_run
from pipeline.inference.engine import InferenceEngine, load
from pipeline.metrics.history import read_history
from pipeline.recipe import recipe_of_run
from preprocess.prompts import encode_dialogue, encode_prompt, load_tokenizer
from preprocess.shards.manifest import Manifest
from tests.support.launch import finish, fork_python, fork_ranks
from tests.support.privileges import OBEY_PERMISSIONS
from tests.support.published import check_published, write_expected

LIMITED = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); "
EXPORT = "runpy.run_module('pipeline.export', run_name='__main__')"


@pytest.fixture(scope="module")
def run(recipe_file, shards, tmp_path_factory):
    """Train on two ranks, so that the checkpoint is sharded. Return the run folder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    program = ["-m", "pipeline.train", recipe_file, f"data.shards={shards}", f"run.dir={folder}", "steps=4"]
    program += [f"evaluate.shards={shards}", "evaluate.every_steps=4", "evaluate.samples=8"]
    finish(fork_ranks(2, program))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny"
    done = fork_python("-m", "pipeline.export", run, out, "--language-model", out.with_name("lm"))
    assert done.returncode == 0, done.stderr
    assert "step 4" in done.stdout
    return out


def assert_one_line(done, message):
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_checkpoint_contains_exactly_the_models_tensors(run):
    state = full_state(run / "checkpoints" / folder_name(4))
    check_state(state, preset("tiny_v2"), run)
    assert state.keys() == Emma(preset("tiny_v2")).state_dict().keys()
    lost = dict(list(state.items())[1:])
    with pytest.raises(UserError, match="1 tensors differ from the model's"):
        check_state(lost, preset("tiny_v2"), run)


def test_an_exported_model_has_the_trained_weights_except_for_the_alignment(run, exported):
    state = full_state(run / "checkpoints" / folder_name(4))
    model, _ = load(exported, "cpu")
    found = model.emma.state_dict()
    assert found.keys() == {name for name in state if not name.startswith("alignment.")}
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_transformers_computes_the_same_with_an_exported_checkpoint(run, tmp_path):
    """Export with the fusion and the decoder, which transformers must ignore."""
    export_run(run, tmp_path / "model", with_alignment=True)
    write_expected(tmp_path / "model", load_tokenizer(tmp_path / "model"))
    done = check_published(tmp_path / "model", scratch=tmp_path)
    assert "model: equal in transformers" in done.stdout, done.stdout + done.stderr
    assert load_model(tmp_path / "model/again").config == replace(preset("tiny_v2"), alignment=None)


def test_the_language_model_of_a_run_is_exported_with_the_tokenizer_of_the_shards(exported, shards):
    folder = exported.with_name("lm")
    assert (folder / "tokenizer.json").read_bytes() == (shards / "tokenizer.json").read_bytes()
    found, whole = (load_file(path / "model.safetensors") for path in (folder, exported))
    assert all(torch.equal(tensor, whole[f"language_model.{name}"]) for name, tensor in found.items())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_export_accepts_moved_shards_and_refuses_other_shards(run, shards, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    export_run(run, tmp_path / "a", step=None, with_alignment=False, overrides=[f"data.shards={moved}"])
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not the shards that|is damaged"):
        export_run(run, tmp_path / "b", step=None, with_alignment=False, overrides=[f"data.shards={moved}"])


def test_an_export_whose_shards_or_towers_are_missing_says_how_to_give_their_place(run, shards, tmp_path):
    done = fork_python("-m", "pipeline.export", run, tmp_path / "out", "data.shards=gone")
    assert_one_line(done, "no such folder; build it with preprocess/build_shards.py. If you moved the shards, ")
    assert "add data.shards=NEW_PLACE" in done.stderr
    done = fork_python("-m", "pipeline.export", run, tmp_path / "out", f"data.shards={shards}", "weights.towers=gone")
    assert_one_line(done, "If you moved the towers' weights, add weights.towers=NEW_PLACE")
    done = fork_python("-m", "pipeline.export", run, tmp_path / "out", "optim.lr=1")
    assert_one_line(done, "Only data.shards, weights.towers, weights.init may be given")
    done = fork_python("-m", "pipeline.export", run, tmp_path / "out", "--language-model", tmp_path / "out")
    assert_one_line(done, "is the folder of the whole model")


def test_every_exported_file_has_the_permissions_that_the_umask_allows(run, tmp_path):
    program = f"import os, runpy; os.umask(0o027); {EXPORT}"
    done = fork_python("-c", program, run, tmp_path / "model", "--language-model", tmp_path / "lm")
    assert done.returncode == 0, done.stderr
    files = [*(tmp_path / "model").iterdir(), *(tmp_path / "lm").iterdir()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".py", ".jinja", ".md"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o640" for path in files}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_error_for_a_file_without_read_permission_says_so(exported, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / name).chmod(0)
    program = OBEY_PERMISSIONS + "import runpy; runpy.run_module('pipeline.generate', run_name='__main__')"
    done = fork_python("-c", program, folder, "--prompt", "x", "--device", "cpu")
    assert done.returncode == 2
    assert str(folder / name) in done.stderr
    assert "may not be read" in done.stderr or "Permission denied" in done.stderr


def test_bf16_halves_the_weights_and_rounds_each_of_them_once(run, exported, tmp_path):
    export_run(run, tmp_path / "half", dtype=torch.bfloat16)
    halves, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", exported))
    assert halves.keys() == whole.keys()
    assert all(torch.equal(half, whole[name].bfloat16()) for name, half in halves.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_card_has_the_facts_of_the_run(run, shards, exported):
    card = (exported / "README.md").read_text()
    history = read_history(run)
    text, align = history.losses[4]
    for fact in (
        "| steps done | 4 of 4 |",
        f"| text loss at step 4 | {text:.4f} |",
        f"| alignment loss at step 4 | {align:.4f} |" if align is not None else "| text loss",
        f"| text loss on held-out samples at step 4 | {history.heldout[4][0]:.4f} |",
        Manifest.load(shards).sha256,
        "| squares | 35 |",
        recipe_of_run(run).fingerprint(),
        f"| torch | {torch.__version__.partition('+')[0]}",
        "| language model | random weights | none |",
        "AutoModelForImageTextToText.from_pretrained",
        "For LoRA, choose the layers `in_proj`",
    ):
        assert fact in card, fact


def test_export_with_alignment_keeps_the_alignment_module(run, tmp_path):
    export_run(run, tmp_path / "whole", step=None, with_alignment=True)
    model, _ = load(tmp_path / "whole", "cpu")
    assert model.emma.alignment is not None


def test_exporting_a_damaged_checkpoint_is_a_user_error(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    victim = next((copy / "checkpoints").rglob("*.master"))
    victim.write_bytes(victim.read_bytes()[:-1])
    done = fork_python("-m", "pipeline.export", copy, tmp_path / "out")
    assert done.returncode == 2
    assert "no intact checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_during_export_is_a_one_line_error_and_leaves_no_loadable_model(run, tmp_path):
    """Simulate the full disk with a limit on file sizes."""
    done = fork_python("-c", LIMITED + EXPORT, run, tmp_path / "out")
    assert_one_line(done, f"{tmp_path / 'out'}: the model could not be written")
    with pytest.raises(UserError):
        load(tmp_path / "out", "cpu")


def test_exporting_an_unreadable_checkpoint_is_a_one_line_error(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    manifest = next((tmp_path / "run/checkpoints").rglob("manifest.json"))
    manifest.unlink()
    manifest.mkdir()  # simulates a disk error, because a folder cannot be read as a file
    step = manifest.parent.name.removeprefix("step-")
    done = fork_python("-m", "pipeline.export", tmp_path / "run", tmp_path / "out", "--step", step)
    assert_one_line(done, "manifest.json")


def test_a_generation_prompt_is_a_prefix_of_the_training_tokens(shards, exported):
    tokenizer = load_tokenizer(exported)
    turns = [("human", "<image>\nWhich colour?"), ("gpt", "red"), ("human", "Sure?"), ("gpt", "Yes")]
    dialogue = [{"from": speaker, "value": value} for speaker, value in turns]
    for template in ("base", "zephyr"):
        whole = encode_dialogue(dialogue, template, tokenizer)
        for questions in (1, 3):
            prompt = encode_prompt(dialogue[:questions], template, tokenizer)
            assert whole.tokens[: len(prompt)] == prompt
            assert len(prompt) in {start for start, _ in whole.spans}


def test_decoding_with_a_cache_equals_recomputing_the_whole_sequence(exported):
    model, tokenizer = load(exported, "cpu")
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (2, 100, 100, 3), np.uint8)
    questions = ["Which colour?", "Say 4", "Which colour?"]
    images = [noise[0], None, noise[1]]
    engine = InferenceEngine(model, tokenizer)
    requests = [engine.request(q, image, max_new_tokens=12) for q, image in zip(questions, images, strict=True)]
    assert [completion.text for completion in engine.complete(requests)] == [
        recompute_all(model, tokenizer, q, p, 12) for q, p in zip(questions, images, strict=True)
    ]


@torch.inference_mode()
def recompute_all(model, tokenizer, question, image, max_new_tokens):
    """Decode greedily without a cache: run the forward pass of the whole sequence for every new token."""
    ids = encode_prompt([{"from": "human", "value": question}], model.config.template, tokenizer)
    new: list[int] = []
    features = None
    if image is not None:
        features = model.towers(torch.from_numpy(image).permute(2, 0, 1)[None])
    while len(new) < max_new_tokens:
        embedded = torch.cat(model.emma.embed(torch.tensor([ids + new]), features), 1)
        hidden, _ = model.emma.llm(embedded)
        new.append(int(model.emma.llm.head(hidden[:, -1]).argmax()))
        if new[-1] == tokenizer.eos_id:
            new.pop()
            break
    return tokenizer.decode(new).strip()


def test_the_generate_command_prints_an_answer(exported, raw_mix):
    image = raw_mix.parent / "images" / "0.png"
    words = [exported, "--image", image, "--prompt", "Which colour?", "--max-new-tokens", "4", "--device", "cpu"]
    done = fork_python("-m", "pipeline.generate", *words)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1


def test_the_generate_command_reports_a_user_error_in_one_line(exported, raw_mix, tmp_path):
    cases = [
        ([tmp_path / "nothing", "--prompt", "x"], "nothing"),
        ([exported, "--image", raw_mix.parent / "absent.png", "--prompt", "x"], "absent.png"),
        ([exported, "--image", raw_mix, "--prompt", "x"], "mix.toml"),
    ]
    for words, said in cases:
        assert_one_line(fork_python("-m", "pipeline.generate", *words), said)


def test_export_with_untrained_writes_the_initial_model_of_a_recipe(recipe_file, shards, tmp_path):
    words = ["--untrained", recipe_file, tmp_path / "start", f"data.shards={shards}", "run.dir=unused"]
    done = fork_python("-m", "pipeline.export", *words)
    assert done.returncode == 0, done.stderr
    model, _ = load(tmp_path / "start", "cpu")
    torch.manual_seed(7)
    fresh = Emma(preset("tiny_v2")).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.emma.state_dict().items())
    assert json.loads((tmp_path / "start/config.json").read_text())
