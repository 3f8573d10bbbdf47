"""Preflight checks before training: shards, weights, shared memory, disk space, and time limits."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.errors import UserError
from pipeline.checkpoint.folder import MANIFEST
from pipeline.distributed.ranks import Ranks
from pipeline.flops import CHECKPOINT_BYTES, count_parameters
from pipeline.recipe import load_recipe
from pipeline.run import preflight
from pipeline.run.preflight import Context
from tests.support.launch import finish, fork_python, fork_ranks

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))

# Runs the preflight on two ranks that simulate two nodes: relative paths are in a different folder on each node.
TWO_NODES = """
import os, sys
from dataclasses import replace
from model.errors import UserError
from pipeline.engine import init_distributed
from pipeline.run.preflight import preflight
from pipeline.distributed.ranks import find_ranks
from pipeline.recipe import load_recipe

recipe = load_recipe(sys.argv[2], sys.argv[3:])
ranks = replace(find_ranks("cpu"), local_rank=0)
init_distributed(ranks)
os.chdir(f"{sys.argv[1]}/node{ranks.rank}")
try:
    preflight(recipe, ranks)
except UserError as error:
    print(f"<rank {ranks.rank}>{error}</>", flush=True)
"""


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def context(recipe_file: Path, shards: Path, *overrides: str) -> Context:
    recipe = load_recipe(recipe_file, [f"data.shards={shards}", "run.dir=none", *overrides])
    return Context(recipe=recipe, ranks=ALONE)


def test_every_rank_reports_all_problems_of_all_nodes_at_once(recipe_file, copy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TWO_NODES)
    for node in ("node0", "node1"):
        (tmp_path / node / "no_towers").mkdir(parents=True)
    (tmp_path / "node0/no_towers/dinov2.safetensors").touch()
    (copy / "shard-00001.tar").unlink()
    wrong = ["optim.micro_batch=3", "evaluate.shards=/no/held-out", "weights.llm=/no/llm", "weights.towers=no_towers"]
    words = [recipe_file, f"data.shards={copy}", f"run.dir={tmp_path}/run", *wrong]
    output = finish(fork_ranks(2, [program, tmp_path, *words]))
    for rank in (0, 1):
        lines = output.split(f"<rank {rank}>")[1].split("</>")[0].splitlines()
        assert lines[0] == f"{len(lines) - 1} problems:"
        for text in ("micro_batch 3", "shard-00001.tar has None bytes", "/no/held-out", "/no/llm", "tower siglip"):
            assert len([line for line in lines if text in line]) == 1, lines


def test_shards_of_wrong_size_are_one_error_with_the_first_names_and_a_count(recipe_file, copy, monkeypatch):
    monkeypatch.setattr(preflight, "MAX_NAMED", 1)
    for shard in copy.glob("*.tar"):
        shard.write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard-00000\.tar has 5 bytes, the manifest says \d+, and 2 more; list all"):
        preflight.check_shards(context(recipe_file, copy))


def test_shard_hashing_stops_at_its_time_limit_and_reports_the_share_hashed(recipe_file, copy, monkeypatch):
    assert "100% of them hashed" in preflight.check_shards(context(recipe_file, copy))
    shard = copy / "shard-00002.tar"
    shard.write_bytes(bytes([1]) + shard.read_bytes()[1:])
    monkeypatch.setattr(preflight, "HASHING_S", 0.0)
    assert "0% of them hashed" in preflight.check_shards(context(recipe_file, copy))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"shard-00002\.tar: its checksum does not match"):
        preflight.check_shards(context(recipe_file, copy))


def test_errors_in_held_out_shards_name_the_recipe_key(recipe_file, shards, copy):
    both = context(recipe_file, shards, f"evaluate.shards={copy}")
    assert preflight.check_held_out_shards(both).startswith("held out: 3 shards of 35 samples")
    other = context(recipe_file, shards, f"evaluate.shards={copy}", "model=tiny_v1")
    with pytest.raises(UserError, match=r"^evaluate\.shards: .*prompt template"):
        preflight.check_held_out_shards(other)


def test_preflight_never_downloads_weights_and_requires_cached_hub_models(recipe_file, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = context(recipe_file, shards, "weights.llm=someone/mamba", "weights.towers=timm")
    for check in (preflight.check_language_model, preflight.check_vision_towers):
        with pytest.raises(UserError, match=r"python -m pipeline\.prefetch"):
            check(hub)
    cached = tmp_path / "models--someone--mamba"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    folder = cached / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    rows = hub.recipe.config.llm.vocab_size
    torch.save({"backbone.embedding.weight": torch.zeros(rows, 2)}, folder / "pytorch_model.bin")
    assert preflight.check_language_model(hub).startswith("language model someone/mamba: ")


def test_preflight_skips_the_pretrained_language_model_if_a_checkpoint_exists(recipe_file, shards, tmp_path):
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000004" / MANIFEST).touch()
    resuming = context(recipe_file, shards, "weights.llm=/no/llm", f"run.dir={tmp_path}")
    assert preflight.check_language_model(resuming) == ""


def test_the_error_for_too_little_shared_memory_suggests_a_remedy(recipe_file, shards):
    with pytest.raises(UserError, match=r"/dev/shm has .* GiB free, but data loading needs .*--shm-size"):
        preflight.check_shared_memory(context(recipe_file, shards, "data.workers=9999999"))


def test_the_error_for_a_disk_that_is_too_small_states_the_space_needed(recipe_file, shards, tmp_path):
    short = context(recipe_file, shards, f"run.dir={tmp_path}/run", "checkpoint.keep_last=999999999")
    with pytest.raises(UserError, match=r"space for 1000000001 checkpoints .* lower checkpoint\.keep_last"):
        preflight.check_checkpoint_space(short)


def test_space_of_interrupted_saves_and_refused_checkpoints_counts_as_free(recipe_file, shards, tmp_path, monkeypatch):
    run = context(recipe_file, shards, f"run.dir={tmp_path}", "checkpoint.keep_last=1")
    each = CHECKPOINT_BYTES * count_parameters(run.recipe.config).trainable
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * each))
    with pytest.raises(UserError, match="space for 3 checkpoints"):
        preflight.check_checkpoint_space(run)
    (tmp_path / "checkpoints/.refused-step-00000008").mkdir(parents=True)
    assert "3 checkpoints" in preflight.check_checkpoint_space(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=each))
    with pytest.raises(UserError, match="1 already on disk"):
        preflight.check_checkpoint_space(run)
    half = tmp_path / "checkpoints/.partial-step-00000009/rank-00000.00.master"
    half.parent.mkdir()
    half.touch()
    os.truncate(half, each)
    assert "3 checkpoints" in preflight.check_checkpoint_space(run)


def test_the_space_check_includes_checkpoints_kept_forever_until_the_last_step(recipe_file, shards, tmp_path):
    """Of the checkpoints of steps 2, 4, …, 12, the newest three are kept, and step 6 is kept forever."""
    every = ["checkpoint.every_steps=2", "checkpoint.keep_every=3", "checkpoint.keep_last=3", f"run.dir={tmp_path}"]
    two_epochs, longer = context(recipe_file, shards, *every), context(recipe_file, shards, "steps=60", *every)
    assert preflight.check_checkpoint_space(two_epochs).startswith("6 checkpoints")
    assert preflight.check_checkpoint_space(longer).startswith("14 checkpoints")


HANGING = """
import threading, torch
from pipeline.run.watchdog import time_limit
from pipeline.distributed.ranks import Ranks
with time_limit(0.1, "the preflight", Ranks(rank=3, local_rank=3, world_size=8, device=torch.device("cpu"))):
    threading.Event().wait()
"""


def test_a_hanging_preflight_ends_with_one_error_line_and_the_retry_exit_code():
    done = fork_python("-c", HANGING)
    assert done.returncode == 4
    assert done.stderr.startswith("error: rank 3 of 8 on ")
    assert "the preflight takes longer than 0.1 s" in done.stderr
