"""Compatibility with shards, checkpoints and runs of version 0.1, see tests/fixtures/v0_1/README.md."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.verify import find_damage
from tests.support.launch import REPOSITORY, finish, fork_python, fork_ranks

V0_1 = REPOSITORY / "tests/fixtures/v0_1"
CHECKPOINT = "checkpoints/step-00000004"
WITH_PRESET = ["-m", "tests.support.micro_preset"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the version 0.1 fixture that tests may change. Paths in its recipe are relative to the copy."""
    return Path(shutil.copytree(V0_1, tmp_path / "v0_1"))


def losses(metrics: Path) -> dict[int, tuple[float | None, ...]]:
    """Return the losses and the gradient norm of each step. For a step logged twice, return the values logged last."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    keys = ("loss/total", "loss/text", "loss/align", "optim/grad_norm")
    return {line["step"]: tuple(line[key] for key in keys) for line in lines if "event" not in line}


def test_a_shard_set_written_by_version_0_1_passes_verification():
    done = fork_python("-m", "preprocess.shardset", "verify", V0_1 / "shards")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_checkpoint_written_by_version_0_1_passes_verification():
    assert find_damage(V0_1 / "run" / CHECKPOINT) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_version_0_1_resumes_and_repeats_its_recorded_losses(folder, ranks):
    metrics = folder / "run/metrics.jsonl"
    expected = losses(metrics)
    lines = metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    metrics.write_text("".join(kept))  # the checkpoint of the fixture is from step 4

    output = finish(fork_ranks(ranks, [*WITH_PRESET, "pipeline.train", "recipe.toml"], cwd=folder))
    assert f"resuming from run/{CHECKPOINT}" in output
    assert json.loads((folder / "run/outcome.json").read_text())["outcome"] == "done"
    resumed = losses(metrics)
    assert sorted(resumed) == sorted(expected) == list(range(1, 9))
    for step in range(5, 9):
        for ours, theirs in zip(resumed[step], expected[step], strict=True):
            assert ours == (theirs if theirs is None else pytest.approx(theirs, rel=1e-5)), f"step {step}"


def test_a_run_of_version_0_1_is_exported_and_the_model_generates_an_answer(folder):
    exported = fork_python(*WITH_PRESET, "pipeline.export", "run", "model", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    question = ["--image", "raw/images/0.png", "--prompt", "Which colour?", "--max-new-tokens", "4"]
    answered = fork_python(*WITH_PRESET, "pipeline.generate", "model", *question, "--device", "cpu", cwd=folder)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
