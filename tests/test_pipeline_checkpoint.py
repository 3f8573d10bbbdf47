"""Saves that are cut off, disks that are full, probes that disagree: what is there then, and what a start does."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
import torch

from pipeline.checkpoint import find_damage, folder_name, full_state, list_steps
from tests.conftest import finish, run_python, torchrun
from tests.killed_program import Stages

STEPS = 12
STAGES = [name for name in vars(Stages) if not name.startswith("_")]


def words(recipe_file, shards, run, *overrides):
    told = [recipe_file, f"data.shards={shards}", f"run.dir={run}", f"steps={STEPS}"]
    return [*told, "checkpoint.every_steps=1", "checkpoint.keep_last=2", *overrides]


@pytest.fixture(scope="module")
def straight(recipe_file, shards, tmp_path_factory):
    """One rank, from the first step to the last."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = run_python("-m", "pipeline.train", *words(recipe_file, shards, run))
    assert done.returncode == 0, done.stderr
    return run


def steps_logged(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "event" not in line]


def test_killed_at_every_stage_of_saving_one_life_after_the_other_it_ends_with_the_same_bits(
    recipe_file, shards, straight, tmp_path
):
    run = tmp_path / "run"
    done = run_python("-m", "tests.killed_program", ",".join(STAGES), *words(recipe_file, shards, run), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("killed")] == [f"killed: {s}" for s in STAGES]
    assert done.stdout.count("resuming from") == len(STAGES)
    assert (
        done.stdout.count("its save was cut off") == 3
    )  # from the first byte to the rename; after it the new one counts
    assert "refused" not in done.stdout
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, straight))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert list_steps(run / "checkpoints") == [STEPS - 1, STEPS]
    assert set(steps_logged(run)) == set(range(1, STEPS + 1))
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A file system of its own. Needs the right to mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_in_one_line_and_the_checkpoints_before_are_as_they_were(
    recipe_file, shards, straight, tmp_path
):
    with small_disk(tmp_path / "disk", megabytes=96) as disk:
        run = disk / "run"
        told = words(recipe_file, shards, run, "checkpoint.every_steps=4")
        finish(torchrun(2, ["tests/rank_program.py", tmp_path / "kept.pt", *told, "until=5"]))
        with (disk / "other").open("wb") as other:
            free = shutil.disk_usage(disk).free
            os.posix_fallocate(other.fileno(), 0, free - (6 << 20))  # less than a checkpoint
        said = finish(torchrun(2, ["tests/rank_program.py", tmp_path / "kept.pt", *told]), code=None)
        assert "UserError" in said
        assert "the checkpoint of step 8 could not be written" in said
        assert "No space left on device" in said
        assert list_steps(run / "checkpoints") == [4]
        assert find_damage(run / "checkpoints" / folder_name(4)) is None
        assert not list((run / "checkpoints").glob(".partial*"))
