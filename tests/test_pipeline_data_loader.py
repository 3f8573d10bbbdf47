"""The data loader: contents and order of batches, and errors for damaged shards and dead workers."""

import os
import re
import shutil
import socket
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset

from model.config import IGNORE_INDEX, PAD_ID
from model.errors import UserError
from pipeline.data.loader import TrainData
from pipeline.data.shard_reader import DamagedShardError, ShardReader
from pipeline.data.workers import prepare_sockets, worker_death
from pipeline.distributed.ranks import Ranks
from pipeline.recipe import load_recipe
from preprocess import socket_folder
from preprocess.images.codec import decode_stored_image
from tests.support.launch import fork_python, run_python


def train_data(recipe_file, shards, world_size=1, rank=0, *overrides):
    recipe = load_recipe(recipe_file, [f"data.shards={shards}", "run.dir=none", *overrides])
    return TrainData(recipe, Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def stock_samples(shards):
    """Return the samples of the shard set as the webdataset package decodes them."""
    urls = sorted(map(str, shards.glob("*.tar")))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))


def rows_of(data, steps):
    """Return a hashable (tokens, supervised tokens, pixels) for each row of the first `steps`, except filler rows."""
    rows = []
    for batch, _ in zip(data.from_step(0), range(steps), strict=False):
        for micro in batch.micro_batches:
            for i in torch.nonzero(micro.real).flatten():
                tokens = micro.tokens[i][: 1 + int((micro.targets[i] != IGNORE_INDEX).nonzero().max())]
                supervised = micro.targets[i][micro.targets[i] != IGNORE_INDEX]
                pixels = b"" if micro.pixels is None else micro.pixels[i].numpy().tobytes()
                rows.append((tuple(tokens.tolist()), tuple(supervised.tolist()), pixels))
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_together_load_the_same_samples_as_the_webdataset_reader(recipe_file, shards, stock_samples, workers):
    ranks = [train_data(recipe_file, shards, 2, rank, f"data.workers={workers}") for rank in (0, 1)]
    steps = ranks[0].plan.steps_per_epoch
    seen = Counter(row for data in ranks for row in rows_of(data, steps))
    expected: Counter[tuple] = Counter()
    for sample in stock_samples:
        tokens, spans = sample["tokens.npy"].tolist(), sample["json"]["spans"]
        supervised = [token for start, end in spans for token in tokens[start:end]]
        pixels = b""
        if "jpg" in sample:
            pixels = sample["jpg"].transpose(2, 0, 1).tobytes()
        expected[tuple(tokens), tuple(supervised), pixels] += 1
    assert seen == expected
    assert sum(seen.values()) == len(stock_samples)
    assert max(seen.values()) == 1


def test_loading_from_a_later_step_gives_the_same_batch_as_the_whole_epoch(recipe_file, shards):
    data = train_data(recipe_file, shards)
    whole = list(data.from_step(0))
    late = next(iter(data.from_step(3)))
    assert torch.equal(late.micro_batches[1].tokens, whole[3].micro_batches[1].tokens)
    assert (late.ids == whole[3].ids).all()


@pytest.mark.parametrize("first", [3, 2])
def test_workers_started_early_are_used_only_if_the_first_step_matches(recipe_file, shards, first):
    whole = list(train_data(recipe_file, shards).from_step(0))
    data = train_data(recipe_file, shards, 1, 0, "data.workers=2")
    data.start_workers(3)
    assert data._started is not None
    _, early = data._started
    batches = data.from_step(first)
    found = next(batches)
    assert (found.ids == whole[first].ids).all()
    assert torch.equal(found.micro_batches[0].tokens, whole[first].micro_batches[0].tokens)
    assert (early.batches._rcvd_idx > 0) is (first == 3)
    batches.close()


def test_abandoned_iterators_leave_no_threads_behind(recipe_file, shards):
    data = train_data(recipe_file, shards)
    next(data.from_step(0))
    before = threading.active_count()
    for first in range(3):
        next(data.from_step(first))
    assert threading.active_count() == before


def test_targets_contain_only_supervised_tokens_and_padding_is_on_the_right(recipe_file, shards):
    data = train_data(recipe_file, shards)
    for batch in data.from_step(0):
        supervised = 0
        for micro in batch.micro_batches:
            where = micro.targets != IGNORE_INDEX
            assert (micro.targets[where] == micro.tokens[where]).all()
            assert not where[~micro.real].any()
            padded = (micro.tokens == PAD_ID).int()
            assert (padded.diff(dim=1) >= 0).all()
            supervised += int(where.sum())
        assert supervised == batch.supervised_tokens


def test_a_batch_reports_its_real_tokens_and_its_padding_ratio(recipe_file, shards):
    data = train_data(recipe_file, shards, 1, 0, "optim.micro_batch=8")
    for batch in data.from_step(0):
        [micro] = batch.micro_batches
        visual = 49 if micro.pixels is not None else 0
        computed = micro.tokens.shape[0] * (micro.tokens.shape[1] + visual)
        assert batch.tokens == int((micro.tokens != PAD_ID)[micro.real].sum()) + visual * batch.samples
        assert batch.padding_ratio == pytest.approx(1 - batch.tokens / computed)


def test_loaded_pixels_equal_the_decoded_stored_image(recipe_file, shards, stock_samples):
    data = train_data(recipe_file, shards)
    row = int(np.flatnonzero(data.plan.has_image)[0])
    stored, _ = data.reader.read(row)
    batch = next(b for b in data.from_step(0) if row in b.ids)
    images = torch.cat([micro.pixels for micro in batch.micro_batches]).permute(0, 2, 3, 1).numpy()
    assert any((image == decode_stored_image(stored.image)).all() for image in images)


def test_shards_built_for_another_model_are_a_user_error(recipe_file, shards):
    with pytest.raises(UserError, match=r"prompt template is 'base'.*'zephyr'"):
        train_data(recipe_file, shards, 1, 0, "model=tiny_v1")
    with pytest.raises(UserError, match=r"image size is 100.*384"):
        train_data(recipe_file, shards, 1, 0, "model=emma_v2")


def test_tokenizers_are_compared_by_content_and_not_by_folder_name(recipe_file, shards, tmp_path):
    same = tmp_path / "elsewhere/other_name"
    same.mkdir(parents=True)
    shutil.copy(shards / "tokenizer.json", same)
    train_data(recipe_file, shards, 1, 0, f"data.tokenizer={same}")
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text((shards / "tokenizer.json").read_text().replace("<|padding|>", "<|filling|>"))
    with pytest.raises(UserError, match="tokenized with 'tokenizer', expected"):
        train_data(recipe_file, shards, 1, 0, f"data.tokenizer={other}")


CUTS = [("tokens_offset", 0), ("tokens_offset", 20), ("meta_offset", 3), ("image_offset", 0), ("image_offset", 500)]


@pytest.mark.parametrize(("column", "beyond"), CUTS)
def test_the_error_for_a_truncated_shard_names_the_sample_and_the_verify_command(
    recipe_file, shards, tmp_path, column, beyond
):
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    data = train_data(recipe_file, damaged)
    row = int(np.flatnonzero(data.plan.has_image)[-1])
    shard = damaged / data.reader.manifest.shards[int(data.reader.columns["shard"][row])].name
    os.truncate(shard, int(data.reader.columns[column][row]) + beyond)
    with pytest.raises(DamagedShardError, match=r"shard-0000\d\.tar: sample \d+ cannot be read") as error:
        ShardReader(damaged).read(row)
    assert f"preprocess.shardset verify {damaged}" in str(error.value)


def test_an_error_in_a_dataloader_worker_is_raised_in_the_rank(recipe_file, shards, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    for tar in damaged.glob("*.tar"):
        os.truncate(tar, 2000)
    with pytest.raises(DamagedShardError, match="cannot be read"):
        list(train_data(recipe_file, damaged, 1, 0, "data.workers=1").from_step(0))


# Suspends the DataLoader worker, kills it after the stall warning, and prints the error that the rank gets.
SUSPEND_AND_KILL = """
import psutil, signal, sys, time, torch
from pipeline.data.loader import TrainData
from pipeline.data.workers import prepare_sockets, worker_death
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.stall_warning import StallWarning
from pipeline.recipe import load_recipe

def on_warning(line):
    if "(stopped)" in line:
        print(line)
        worker.kill()

alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
data = TrainData(load_recipe(sys.argv[1], sys.argv[2:]), alone)
data.stall_warning = StallWarning(on_warning, limit_s=0.5)
batches = data.from_step(0)
next(batches)
[worker] = [child for child in psutil.Process().children() if "--multiprocessing-fork" in child.cmdline()]
worker.suspend()
print(worker.pid)
try:
    list(batches)
except RuntimeError as error:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print(worker_death(error, data.ranks) or error)
"""


def test_messages_name_the_dataloader_worker_that_hangs_or_is_killed(recipe_file, shards):
    overrides = (f"data.shards={shards}", "run.dir=none", "data.workers=1")
    done = fork_python("-c", SUSPEND_AND_KILL, recipe_file, *overrides)
    assert done.returncode == 0, done.stderr
    pid, warning, death = done.stdout.splitlines()
    where = f"rank 0 on {socket.gethostname()}"
    assert warning.startswith(f"{where}: waiting for data from DataLoader worker {pid} (stopped) takes longer than")
    # torch raises different errors, depending on where the rank was when the worker died.
    assert re.match(rf"{where}: DataLoader worker {pid} (ended|exited|is killed by signal)", death)


# Prints the number of the first step after a DataLoader worker has loaded it.
LOAD_A_STEP = """
import sys, torch
from pipeline.data.loader import TrainData
from pipeline.distributed.ranks import Ranks
from pipeline.recipe import load_recipe

alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
data = TrainData(load_recipe(sys.argv[1], sys.argv[2:]), alone)
print(next(data.from_step(0)).step)
"""


def test_dataloader_workers_send_their_tensors_although_the_path_of_tmpdir_is_long(recipe_file, shards, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    overrides = (f"data.shards={shards}", "run.dir=none", "data.workers=1")
    done = run_python("-c", LOAD_A_STEP, recipe_file, *overrides, TMPDIR=str(long))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_preparing_sockets_without_a_usable_folder_is_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))
    monkeypatch.setattr(socket_folder, "ALTERNATIVES", ("/proc", "/dev/null"))
    with pytest.raises(UserError, match=r"^no folder for sockets: .*longlong .*set TMPDIR to another folder$"):
        prepare_sockets()


def test_a_dataloader_worker_that_cannot_send_its_tensors_ends_with_an_error(recipe_file, shards):
    remove = "data.start_workers(0); shutil.rmtree(multiprocessing.util.get_temp_dir())\n"
    program = "import multiprocessing, shutil" + LOAD_A_STEP.replace("print(next", remove + "print(next")
    done = fork_python("-c", program, recipe_file, f"data.shards={shards}", "run.dir=none", "data.workers=1")
    assert "cannot send a micro-batch: FileNotFoundError" in done.stderr
    assert re.search(r"RuntimeError: DataLoader worker \(pid\(?s?\)? ?\d+\) exited unexpectedly", done.stderr)


def test_worker_death_returns_none_for_unrelated_errors():
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    assert worker_death(RuntimeError("any other"), alone) is None
