"""A checkpoint is the same training on any number of ranks and under either ZeRO stage.

The oracle is DeepSpeed's own view of each parameter before the save and after the load.
"""

import json

import numpy as np
import pytest
import torch

from model.errors import UserError
from pipeline.checkpoint.folder import folder_name
from pipeline.checkpoint.layout import Layout, read_into
from pipeline.checkpoint.manifest import read_manifest
from pipeline.zero import Piece
from tests.support.launch import finish, fork_ranks

STEPS = 12
ZERO = {2: "ds_configs/zero2.json", 3: "ds_configs/zero3_small.json"}
LOSS_TOLERANCE = 2e-6  # relative; ranks and micro-batches only change the order of fp32 sums


def run_ranks(recipe_file, shards, run, ranks, stage, until, *words):
    out = run.parent / f"kept-{ranks}-{until}.pt"
    program = [
        "tests/programs/train_on_ranks.py",
        out,
        recipe_file,
        f"data.shards={shards}",
        f"run.dir={run}",
        f"steps={STEPS}",
    ]
    split = [f"engine.ds_config={ZERO[stage]}", f"optim.micro_batch={8 // max(ranks, 2)}"]
    finish(fork_ranks(ranks, [*program, *split, f"until={until}", "keep=states", *words]))
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def lives(recipe_file, shards, tmp_path_factory):
    """2 ranks of ZeRO-3 to step 4, on a slow disk; 1 of ZeRO-2 to step 8; 4 of ZeRO-3 to the end."""
    run = tmp_path_factory.mktemp("elastic") / "run"
    told = (recipe_file, shards, run)
    return run, [
        run_ranks(*told, 2, 3, 6, "disk=slow"),
        run_ranks(*told, 1, 2, 8),
        run_ranks(*told, 4, 3, STEPS),
    ]


@pytest.fixture(scope="module")
def undisturbed(recipe_file, shards, tmp_path_factory):
    return run_ranks(recipe_file, shards, tmp_path_factory.mktemp("straight") / "run", 1, 3, STEPS)


def assert_equal_states(ours, theirs):
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert [name for name in ours[kind] if not torch.equal(ours[kind][name], theirs[kind][name])] == []
        assert any(tensor.any() for tensor in ours[kind].values())
    assert ours["groups"] == theirs["groups"]
    assert set(ours["updates"]) == set(theirs["updates"])


def test_masters_moments_groups_and_update_counts_survive_any_change_of_ranks_and_stage(lives):
    _, (first, second, third) = lives
    assert (second["first"], third["first"]) == (4, 8)
    assert_equal_states(second["states"][4], first["states"][4])
    assert_equal_states(third["states"][8], second["states"][8])
    assert set(third["states"][8]["updates"]) == {8.0}
    assert [group["weight_decay"] for group in third["states"][8]["groups"]] == [0.1, 0.0]
    assert second["notes"][-1] == "resharded from 2 to 1 ranks, from ZeRO-3 to ZeRO-2"


def test_a_state_before_its_first_update_can_be_saved_too(lives):
    _, (first, second, _) = lives
    assert (first["untrained"], second["untrained"]) == (0.0, None)


def test_the_losses_after_it_are_those_of_the_undisturbed_run(lives, undisturbed):
    _, (first, second, third) = lives
    reports = [*first["reports"][:4], *second["reports"], *third["reports"]]
    assert len(reports) == len(undisturbed["reports"]) == STEPS
    for ours, theirs in zip(reports, undisturbed["reports"], strict=True):
        assert ours["learning_rates"] == theirs["learning_rates"]
        for loss in ("text", "total"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=LOSS_TOLERANCE)


def test_what_is_saved_is_the_state_of_its_step_though_training_goes_on_meanwhile(lives):
    run, (first, *_) = lives
    assert [report["writing_here"] for report in first["reports"]] == [False, False, False, False, True, True]
    folder = run / "checkpoints" / folder_name(4)
    assert read_manifest(folder)["updates"] == 4.0
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        saved = Layout.load(folder).assemble(folder, kind)
        for name, tensor in first["states"][4][kind].items():
            assert torch.equal(saved[name], tensor), f"{kind} of {name}"


def cut(rng, sizes, ranks):
    """The pieces of `ranks` files, cut at random, with gaps, and the order of parameters shuffled."""
    files: dict[str, list[Piece]] = {f"rank-{rank:05d}.00": [] for rank in range(ranks)}
    ends = dict.fromkeys(files, 0)
    for name in rng.permutation(list(sizes)):
        cuts = np.sort(rng.integers(0, sizes[name] + 1, ranks - 1)).tolist()
        for file, start, end in zip(files, [0, *cuts], [*cuts, sizes[name]], strict=True):
            if start < end:
                files[file].append(Piece(str(name), start, end - start, ends[file]))
                ends[file] += end - start + int(rng.integers(0, 3))
    return files


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_the_parameters_is_found_again_by_any_other(tmp_path, seed):
    rng = np.random.Generator(np.random.Philox(key=seed))
    sizes = {f"p{i}": int(rng.integers(1, 30)) for i in range(6)}
    truth = {name: torch.arange(size) + 100.0 * int(name[1:]) for name, size in sizes.items()}
    saved, wanted = (cut(rng, sizes, int(rng.integers(1, 6))) for _ in range(2))
    for file, pieces in saved.items():
        flat = torch.full((200,), torch.nan)
        for piece in pieces:
            flat[piece.offset : piece.offset + piece.count] = truth[piece.name][piece.start : piece.end]
        (tmp_path / f"{file}.master").write_bytes(flat.numpy().tobytes())
    Layout({name: [size] for name, size in sizes.items()}, {"tied": "p0"}, saved).save(tmp_path)
    layout = Layout.load(tmp_path)
    for pieces in wanted.values():
        flat = torch.zeros(200)
        read_into(flat, tmp_path, "master", layout.reads(pieces))
        for piece in pieces:
            assert torch.equal(
                flat[piece.offset : piece.offset + piece.count], truth[piece.name][piece.start : piece.end]
            )
    whole = layout.assemble(tmp_path, "master")
    assert torch.equal(whole["tied"], truth["p0"])
    assert all(torch.equal(whole[name], truth[name]) for name in sizes)


def test_the_same_cut_is_read_in_one_go_and_a_missing_number_is_named(tmp_path):
    pieces = [Piece("a", 0, 5, 0), Piece("b", 0, 7, 5)]
    layout = Layout({"a": [5], "b": [7]}, {}, {"rank-00000.00": pieces})
    assert [read.count for read in layout.reads(pieces)] == [12]
    with pytest.raises(UserError, match="b: no file of the checkpoint holds its value 7"):
        layout.reads([Piece("b", 2, 6, 0)])
    assert json.dumps(layout.shapes)
