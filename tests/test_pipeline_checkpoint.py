"""Saves that are cut off, disks that are full, probes that disagree: what is there then, and what a start does."""

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
STAGES = [  # tests.programs.soak_training has all that kill
    *("half_written", "manifest_written", "before_latest"),
    *("hashing_fails", "loading_fails", "pruning", "writing_fails"),
]


def words(recipe_file, shards, run, *overrides):
    told = [recipe_file, f"data.shards={shards}", f"run.dir={run}", f"steps={STEPS}"]
    return [*told, "checkpoint.every_steps=1", "checkpoint.keep_last=3", *overrides]


@pytest.fixture(scope="module")
def straight(recipe_file, shards, tmp_path_factory):
    """One rank, from the first step to the last, waiting for every save."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = fork_python("-m", "pipeline.train", *words(recipe_file, shards, run, "checkpoint.background=false"))
    assert done.returncode == 0, done.stderr
    return run


def steps_logged(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "event" not in line]


def test_killed_at_every_stage_or_failed_by_its_disk_one_life_after_the_other_it_ends_with_the_same_bits(
    recipe_file, shards, straight, tmp_path
):
    run = tmp_path / "run"
    done = fork_python(
        "-m", "tests.programs.killed_training", ",".join(STAGES), *words(recipe_file, shards, run), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lives = [line for line in done.stdout.splitlines() if line.startswith("survived")]
    assert lives == [f"survived: {stage}" for stage in STAGES]
    resumed = [int(step) for step in re.findall(r"resuming from .*/step-(\d+)", done.stdout)]
    assert resumed == [1, 2, 4, 6, 7]
    assert done.stdout.count("its save was cut off") == 2  # after the rename the new one counts
    assert done.stdout.count("its deletion was cut off") == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ["Stale file handle" in failed[0], "Input/output error" in failed[1]] == [True, True]
    assert "step 8 could not be written ([Errno 110] Connection timed out)" in failed[2]
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, straight))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert list_steps(run / "checkpoints") == [STEPS - 2, STEPS - 1, STEPS]
    assert set(steps_logged(run)) == set(range(1, STEPS + 1))
    kept = [folder_name(step) for step in (STEPS - 2, STEPS - 1, STEPS)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *kept]


def test_a_state_that_computes_something_else_is_refused_and_the_one_before_is_loaded_over_it(
    recipe_file, shards, straight, tmp_path
):
    """Here to the bit; on another machine by more than rounding explains."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoints/latest").unlink()  # it is for people; resuming does not need it
    newest, middle, oldest = (run / "checkpoints" / folder_name(step) for step in (STEPS, STEPS - 1, STEPS - 2))
    probe = read_manifest(newest)["probe"]
    elsewhere = probe["where"] | {"machine": "another"}
    rewrite_probe(newest, lambda text: {"text": math.nextafter(text, 0)})
    rewrite_probe(middle, lambda text: {"text": text * (1 + 5e-5), "where": elsewhere})
    rewrite_probe(oldest, lambda text: {"text": text * (1 + 5e-5), "where": elsewhere})
    before = sorted(path.name for path in (run / "checkpoints").iterdir())

    nowhere = fork_python("-m", "pipeline.train", *words(recipe_file, shards, run))
    assert nowhere.returncode == 4, nowhere.stderr
    assert "their files are sound" in nowhere.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before

    rewrite_probe(oldest, lambda text: {"text": text / (1 + 5e-5) * (1 + 5e-6)})
    done = fork_python("-m", "pipeline.train", *words(recipe_file, shards, run))
    assert done.returncode == 0, done.stderr
    assert f"refused {newest}: the text loss of the probe is {probe['text']!r}" in done.stdout
    assert f"refused {middle}" in done.stdout
    assert "(relative tolerance 1e-05)" in done.stdout
    assert f"resuming from {oldest}" in done.stdout
    assert read_manifest(newest)["probe"] == probe
    assert read_manifest(newest.with_name(f".doubted-{newest.name}"))["probe"] != probe, "the next saves deleted it"
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, straight))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def rewrite_probe(folder, change):
    manifest = read_manifest(folder)
    manifest["probe"].update(change(manifest["probe"]["text"]))
    write_manifest(folder, manifest)


def test_a_manifest_with_any_bit_flipped_is_not_read(straight, tmp_path):
    content = (straight / "checkpoints" / folder_name(STEPS) / MANIFEST).read_bytes()
    draw = random.Random(1)
    for place in draw.sample(range(len(content)), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / MANIFEST).write_bytes(damaged)
        if json_of(damaged) == json.loads(content):
            continue  # white space
        with pytest.raises(UserError, match="no readable manifest"):
            read_manifest(tmp_path)


def json_of(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_the_benchmark_saves_and_loads_what_it_times(tmp_path):
    figures = tmp_path / "figures.json"
    program = ["-m", "benchmarks.checkpoint", tmp_path / "scratch", "pipeline/recipes/demo.toml", "--json", figures]
    done = fork_python(*program)
    assert "| verify and load, on resuming |" in done.stdout, done.stderr
    assert json.loads(figures.read_text())["equal"]
    assert list((tmp_path / "scratch").iterdir()) == []


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
    recipe_file, shards, tmp_path
):
    with small_disk(tmp_path / "disk", megabytes=96) as disk:
        run = disk / "run"
        told = words(recipe_file, shards, run, "checkpoint.every_steps=4", f"fill={disk / 'other'}")
        said = finish(fork_ranks(2, ["tests/programs/train_on_ranks.py", tmp_path / "kept.pt", *told]), code=None)
        assert "UserError" in said
        assert "the checkpoint of step 8 could not be written" in said
        assert "No space left on device" in said
        assert list_steps(run / "checkpoints") == [4]
        assert find_damage(run / "checkpoints" / folder_name(4)) is None
        assert not list((run / "checkpoints").glob(".partial*"))


def test_a_checkpoint_that_lost_its_manifest_is_refused_aloud_and_goes_with_the_next_save(
    recipe_file, shards, straight, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = run / "checkpoints" / folder_name(STEPS)
    (newest / MANIFEST).unlink()
    done = fork_python("-m", "pipeline.train", *words(recipe_file, shards, run))
    assert done.returncode == 0, done.stderr
    assert f"refused {newest}: it has no {MANIFEST}" in done.stdout
    assert f"resuming from {run / 'checkpoints' / folder_name(STEPS - 1)}" in done.stdout
    assert list((run / "checkpoints").glob(".refused-*")) == []
    assert find_damage(newest) is None


def test_files_are_read_into_memory_while_they_are_hashed_and_damage_is_found_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.checkpoint.verify.BLOCK_BYTES", 30_000)
    numbers = torch.arange(100_000, dtype=torch.float32)
    data = numbers.numpy().tobytes()
    facts = {"a": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (tmp_path / "a").write_bytes(data)
    memory = torch.zeros_like(numbers)
    assert first_damage(tmp_path, facts, into={"a": memory}) is None
    assert torch.equal(memory, numbers)
    flipped = bytearray(data)
    flipped[12_345] ^= 1
    for damaged, said in ((flipped, "has changed"), (data[:-4], "expected 400000"), (None, "is missing")):
        (tmp_path / "a").unlink() if damaged is None else (tmp_path / "a").write_bytes(damaged)
        assert said in str(first_damage(tmp_path, facts, into={"a": memory}))


@pytest.mark.parametrize(
    ("now", "saved", "same"),
    [
        (1.0, 1.0, True),
        (1.0, 1.0 + 1e-6, True),
        (1.0, 1.1, False),
        (math.inf, math.inf, True),  # diverged when it was saved: it is that state still
        (math.nan, math.nan, True),
        (1.0, math.inf, False),
        (math.inf, 1.0, False),
        (math.nan, 1.0, False),
        (math.inf, -math.inf, False),
    ],
)
def test_the_probe_asks_for_the_loss_that_was_saved_finite_or_not(now, saved, same):
    assert losses_agree(now, saved, tolerance=1e-5) is same
