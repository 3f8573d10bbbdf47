"""Recovery from interrupted saves, full or failing disks, damaged checkpoints, and changed probe losses."""

import contextlib
import hashlib
import json
import math
import random
import re
import shutil
import subprocess

import pytest
import torch

from model.errors import UserError
from pipeline.checkpoint.folder import MANIFEST, folder_name, list_steps
from pipeline.checkpoint.layout import full_state
from pipeline.checkpoint.manifest import read_manifest, write_manifest
from pipeline.checkpoint.probe import losses_agree
from pipeline.checkpoint.verify import find_damage, first_damage
from tests.support.launch import finish, fork_python, fork_ranks

STEPS = 12
STAGES = [  # a selection; tests.programs.soak_training kills runs at all stages
    *("half_written", "manifest_written", "before_latest"),
    *("hashing_fails", "loading_fails", "pruning", "writing_fails"),
]


def arguments(recipe_file, shards, run, *overrides):
    required = [recipe_file, f"data.shards={shards}", f"run.dir={run}", f"steps={STEPS}"]
    return [*required, "checkpoint.every_steps=1", "checkpoint.keep_last=3", *overrides]


@pytest.fixture(scope="module")
def uninterrupted(recipe_file, shards, tmp_path_factory):
    """Train on one rank without interruption, with saves that block training. Return the run folder."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = fork_python("-m", "pipeline.train", *arguments(recipe_file, shards, run, "checkpoint.background=false"))
    assert done.returncode == 0, done.stderr
    return run


def steps_logged(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "event" not in line]


def test_a_run_interrupted_at_each_stage_of_a_save_ends_with_the_same_weights(
    recipe_file, shards, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    done = fork_python(
        "-m", "tests.programs.killed_training", ",".join(STAGES), *arguments(recipe_file, shards, run), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    survived = [line for line in done.stdout.splitlines() if line.startswith("survived")]
    assert survived == [f"survived: {stage}" for stage in STAGES]
    resumed = [int(step) for step in re.findall(r"resuming from .*/step-(\d+)", done.stdout)]
    assert resumed == [1, 2, 4, 6, 7]
    # A save that is interrupted after its rename counts as complete.
    assert done.stdout.count("its save was cut off") == 2
    assert done.stdout.count("its deletion was cut off") == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ["Stale file handle" in failed[0], "Input/output error" in failed[1]] == [True, True]
    assert "step 8 could not be written ([Errno 110] Connection timed out)" in failed[2]
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert list_steps(run / "checkpoints") == [STEPS - 2, STEPS - 1, STEPS]
    assert set(steps_logged(run)) == set(range(1, STEPS + 1))
    kept = [folder_name(step) for step in (STEPS - 2, STEPS - 1, STEPS)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *kept]


def test_resuming_refuses_a_checkpoint_with_changed_probe_losses(recipe_file, shards, uninterrupted, tmp_path):
    """A checkpoint must reproduce its recorded losses exactly on the same machine, and within 1e-5 on another."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "checkpoints/latest").unlink()  # resuming does not need `latest`
    newest, middle, oldest = (run / "checkpoints" / folder_name(step) for step in (STEPS, STEPS - 1, STEPS - 2))
    probe = read_manifest(newest)["probe"]
    elsewhere = probe["where"] | {"machine": "another"}
    rewrite_probe(newest, lambda text: {"text": math.nextafter(text, 0)})
    rewrite_probe(middle, lambda text: {"text": text * (1 + 5e-5), "where": elsewhere})
    rewrite_probe(oldest, lambda text: {"text": text * (1 + 5e-5), "where": elsewhere})
    before = sorted(path.name for path in (run / "checkpoints").iterdir())

    refused = fork_python("-m", "pipeline.train", *arguments(recipe_file, shards, run))
    assert refused.returncode == 4, refused.stderr
    assert "their files are undamaged" in refused.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before

    rewrite_probe(oldest, lambda text: {"text": text / (1 + 5e-5) * (1 + 5e-6)})
    done = fork_python("-m", "pipeline.train", *arguments(recipe_file, shards, run))
    assert done.returncode == 0, done.stderr
    assert f"refused {newest}: the text loss of the probe is {probe['text']!r}" in done.stdout
    assert f"refused {middle}" in done.stdout
    assert "(relative tolerance 1e-05)" in done.stdout
    assert f"resuming from {oldest}" in done.stdout
    assert read_manifest(newest)["probe"] == probe
    assert read_manifest(newest.with_name(f".doubted-{newest.name}"))["probe"] != probe, (
        "the refused checkpoint was deleted"
    )
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, uninterrupted))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def rewrite_probe(folder, change):
    manifest = read_manifest(folder)
    manifest["probe"].update(change(manifest["probe"]["text"]))
    write_manifest(folder, manifest)


def test_a_checkpoint_manifest_with_a_flipped_bit_is_rejected(uninterrupted, tmp_path):
    content = (uninterrupted / "checkpoints" / folder_name(STEPS) / MANIFEST).read_bytes()
    rng = random.Random(1)
    for position in rng.sample(range(len(content)), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        (tmp_path / MANIFEST).write_bytes(damaged)
        if parse_or_none(damaged) == json.loads(content):
            continue  # the flipped bit is in white space
        with pytest.raises(UserError, match="no readable manifest"):
            read_manifest(tmp_path)


def parse_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_the_checkpoint_benchmark_loads_the_state_that_it_saved(tmp_path):
    figures = tmp_path / "figures.json"
    program = ["-m", "benchmarks.checkpoint", tmp_path / "scratch", "pipeline/recipes/demo.toml", "--json", figures]
    done = fork_python(*program)
    assert "| verify and load, on resuming |" in done.stdout, done.stderr
    assert json.loads(figures.read_text())["equal"]
    assert list((tmp_path / "scratch").iterdir()) == []


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """Mount a file system of this size, or skip the test if mounting is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not permit mounting a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_during_a_save_is_one_error_and_keeps_earlier_checkpoints_intact(recipe_file, shards, tmp_path):
    with small_disk(tmp_path / "disk", megabytes=96) as disk:
        run = disk / "run"
        program = ["tests/programs/train_on_ranks.py", f"--fill-disk={disk / 'other'}", tmp_path / "kept.pt"]
        run_arguments = arguments(recipe_file, shards, run, "checkpoint.every_steps=4")
        output = finish(fork_ranks(2, [*program, *run_arguments]), code=None)
        assert "UserError" in output
        assert "the checkpoint of step 8 could not be written" in output
        assert "No space left on device" in output
        assert list_steps(run / "checkpoints") == [4]
        assert find_damage(run / "checkpoints" / folder_name(4)) is None
        assert not list((run / "checkpoints").glob(".partial*"))


def test_a_checkpoint_without_a_manifest_is_refused_and_deleted_by_the_next_save(
    recipe_file, shards, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = run / "checkpoints" / folder_name(STEPS)
    (newest / MANIFEST).unlink()
    done = fork_python("-m", "pipeline.train", *arguments(recipe_file, shards, run))
    assert done.returncode == 0, done.stderr
    assert f"refused {newest}: it has no {MANIFEST}" in done.stdout
    assert f"resuming from {run / 'checkpoints' / folder_name(STEPS - 1)}" in done.stdout
    assert list((run / "checkpoints").glob(".refused-*")) == []
    assert find_damage(newest) is None


def test_damage_is_found_in_files_that_are_hashed_while_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.checkpoint.verify.BLOCK_BYTES", 30_000)
    values = torch.arange(100_000, dtype=torch.float32)
    data = values.numpy().tobytes()
    files = {"a": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (tmp_path / "a").write_bytes(data)
    memory = torch.zeros_like(values)
    assert first_damage(tmp_path, files, into={"a": memory}) is None
    assert torch.equal(memory, values)
    flipped = bytearray(data)
    flipped[12_345] ^= 1
    for damaged, message in ((flipped, "has changed"), (data[:-4], "expected 400000"), (None, "is missing")):
        (tmp_path / "a").unlink() if damaged is None else (tmp_path / "a").write_bytes(damaged)
        assert message in str(first_damage(tmp_path, files, into={"a": memory}))


@pytest.mark.parametrize(
    ("now", "saved", "agree"),
    [
        (1.0, 1.0, True),
        (1.0, 1.0 + 1e-6, True),
        (1.0, 1.1, False),
        (math.inf, math.inf, True),  # the run had already diverged when it saved this state
        (math.nan, math.nan, True),
        (1.0, math.inf, False),
        (math.inf, 1.0, False),
        (math.nan, 1.0, False),
        (math.inf, -math.inf, False),
    ],
)
def test_probe_losses_agree_within_the_tolerance_or_if_both_are_inf_or_nan(now, saved, agree):
    assert losses_agree(now, saved, tolerance=1e-5) is agree
