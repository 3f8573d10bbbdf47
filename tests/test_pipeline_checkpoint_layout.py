"""Resharding: resuming a checkpoint on another number of ranks or with another ZeRO stage.

The tests compare the state that DeepSpeed reports before a save with the state that it reports after the load.
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
# Relative tolerance. The number of ranks and the micro-batch size change only the order of fp32 sums.
LOSS_TOLERANCE = 2e-6


def run_ranks(recipe_file, shards, run, ranks, stage, until, *options):
    out = run.parent / f"kept-{ranks}-{until}.pt"
    program = [
        "tests/programs/train_on_ranks.py",
        "--states",
        f"--until={until}",
        *options,
        out,
        recipe_file,
        f"data.shards={shards}",
        f"run.dir={run}",
        f"steps={STEPS}",
    ]
    split = [f"engine.ds_config={ZERO[stage]}", f"optim.micro_batch={8 // max(ranks, 2)}"]
    finish(fork_ranks(ranks, [*program, *split]))
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def three_starts(recipe_file, shards, tmp_path_factory):
    """Train one run in three launches: 2 ranks with ZeRO-3, then 1 rank with ZeRO-2, then 4 ranks with ZeRO-3.

    The first launch ends at step 6 with a checkpoint of step 4, from which the second launch resumes. The third launch
    resumes from step 8.
    """
    run = tmp_path_factory.mktemp("resharded") / "run"
    inputs = (recipe_file, shards, run)
    return run, [
        run_ranks(*inputs, 2, 3, 6, "--hold-writes"),
        run_ranks(*inputs, 1, 2, 8),
        run_ranks(*inputs, 4, 3, STEPS),
    ]


@pytest.fixture(scope="module")
def uninterrupted(recipe_file, shards, tmp_path_factory):
    return run_ranks(recipe_file, shards, tmp_path_factory.mktemp("uninterrupted") / "run", 1, 3, STEPS)


def assert_equal_states(ours, theirs):
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert [name for name in ours[kind] if not torch.equal(ours[kind][name], theirs[kind][name])] == []
        assert any(tensor.any() for tensor in ours[kind].values())
    assert ours["groups"] == theirs["groups"]
    assert set(ours["updates"]) == set(theirs["updates"])


def test_resharding_preserves_masters_moments_groups_and_update_counts(three_starts):
    _, (first, second, third) = three_starts
    assert (second["first"], third["first"]) == (4, 8)
    assert_equal_states(second["states"][4], first["states"][4])
    assert_equal_states(third["states"][8], second["states"][8])
    assert set(third["states"][8]["updates"]) == {8.0}
    assert [group["weight_decay"] for group in third["states"][8]["groups"]] == [0.1, 0.0]
    assert second["notes"][-1] == "resharded from 2 to 1 ranks, from ZeRO-3 to ZeRO-2"


def test_a_snapshot_can_be_taken_before_the_first_update(three_starts):
    _, (first, second, _) = three_starts
    assert (first["untrained"], second["untrained"]) == (0.0, None)


def test_losses_after_resharding_equal_those_of_the_uninterrupted_run(three_starts, uninterrupted):
    _, (first, second, third) = three_starts
    reports = [*first["reports"][:4], *second["reports"], *third["reports"]]
    assert len(reports) == len(uninterrupted["reports"]) == STEPS
    for ours, theirs in zip(reports, uninterrupted["reports"], strict=True):
        assert ours["learning_rates"] == theirs["learning_rates"]
        for loss in ("text", "total"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=LOSS_TOLERANCE)


def test_a_background_save_contains_the_state_of_its_step_while_training_continues(three_starts):
    run, (first, *_) = three_starts
    assert [report["writing_here"] for report in first["reports"]] == [False, False, False, False, True, True]
    folder = run / "checkpoints" / folder_name(4)
    assert read_manifest(folder)["updates"] == 4.0
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        saved = Layout.load(folder).assemble(folder, kind)
        for name, tensor in first["states"][4][kind].items():
            assert torch.equal(saved[name], tensor), f"{kind} of {name}"


def random_split(rng, sizes, ranks):
    """Split each parameter at random into pieces in `ranks` files, in shuffled order and with gaps between pieces."""
    files: dict[str, list[Piece]] = {f"rank-{rank:05d}.00": [] for rank in range(ranks)}
    ends = dict.fromkeys(files, 0)
    for name in rng.permutation(list(sizes)):
        bounds = np.sort(rng.integers(0, sizes[name] + 1, ranks - 1)).tolist()
        for file, start, end in zip(files, [0, *bounds], [*bounds, sizes[name]], strict=True):
            if start < end:
                files[file].append(Piece(str(name), start, end - start, ends[file]))
                ends[file] += end - start + int(rng.integers(0, 3))
    return files


@pytest.mark.parametrize("seed", range(20))
def test_parameters_saved_in_one_random_split_can_be_read_in_another(tmp_path, seed):
    rng = np.random.Generator(np.random.Philox(key=seed))
    sizes = {f"p{i}": int(rng.integers(1, 30)) for i in range(6)}
    truth = {name: torch.arange(size) + 100.0 * int(name[1:]) for name, size in sizes.items()}
    saved, wanted = (random_split(rng, sizes, int(rng.integers(1, 6))) for _ in range(2))
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


def test_adjacent_pieces_are_merged_into_one_read_and_a_missing_value_is_an_error(tmp_path):
    pieces = [Piece("a", 0, 5, 0), Piece("b", 0, 7, 5)]
    layout = Layout({"a": [5], "b": [7]}, {}, {"rank-00000.00": pieces})
    assert [read.count for read in layout.reads(pieces)] == [12]
    with pytest.raises(UserError, match="b: no file of the checkpoint holds its value 7"):
        layout.reads([Piece("b", 2, 6, 0)])
    assert json.dumps(layout.shapes)
