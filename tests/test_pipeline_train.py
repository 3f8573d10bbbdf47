"""Training on two ranks: bit-identical results after kills, stops and damage, and one-line errors."""

import errno
import fcntl
import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch

from model.errors import UserError
from pipeline.checkpoint.folder import folder_name, list_steps
from pipeline.checkpoint.layout import full_state
from pipeline.checkpoint.verify import find_damage
from pipeline.distributed.ranks import Ranks
from pipeline.recipe import load_recipe
from pipeline.run.failure import exit_after
from pipeline.run.folder import RunFolder
from tests.support.launch import finish, fork_python, fork_ranks, kill_all, run_python, torchrun

STEPS = 12  # two epochs


def command(recipe_file, shards, run, *overrides):
    return [
        "-m",
        "pipeline.train",
        recipe_file,
        f"data.shards={shards}",
        f"run.dir={run}",
        f"steps={STEPS}",
        *overrides,
    ]


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> dict[int, tuple]:
    """Return the losses of each step. For a step that was repeated after a resume, return the losses logged last."""
    return {
        line["step"]: (line["loss/text"], line["loss/align"], line["optim/grad_norm"])
        for line in lines(run)
        if "event" not in line
    }


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


def wait_for(condition, process, timeout=180):
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(recipe_file, shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(torchrun(2, command(recipe_file, shards, run)))
    return run


def assert_same_end(run, undisturbed):
    assert (outcome(run)["outcome"], outcome(run)["step"]) == ("done", STEPS)
    ours, theirs = (full_state(folder / "checkpoints" / folder_name(STEPS)) for folder in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert losses(run) == losses(undisturbed)


def test_a_run_logs_every_step_and_ends_with_a_checkpoint(undisturbed):
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))
    events = [(line["event"], line["step"]) for line in lines(undisturbed) if "event" in line]
    assert events == [("start", 0), ("save", 4), ("save", 8), ("save", STEPS), ("done", STEPS)]
    assert outcome(undisturbed) == {"outcome": "done", "step": STEPS, "from_step": 0, "reason": ""}
    assert list_steps(undisturbed / "checkpoints") == [4, 8, 12]
    assert (undisturbed / "checkpoints/latest").read_text().strip() == folder_name(STEPS)


def test_a_memory_budget_changes_recomputation_but_not_the_trained_weights(recipe_file, shards, undisturbed, tmp_path):
    budget = ["engine.segment_layers=2", "engine.memory_gib=1"]
    assert "6 keep" in finish(fork_ranks(2, command(recipe_file, shards, tmp_path / "run", *budget)))
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_killed_run_that_resumes_ends_bit_identical_to_an_uninterrupted_run(
    recipe_file, shards, undisturbed, tmp_path
):
    run = tmp_path / "run"
    process = fork_ranks(2, command(recipe_file, shards, run))
    wait_for(lambda: list_steps(run / "checkpoints"), process)
    kill_all(process)
    assert max(losses(run)) < STEPS
    assert not (run / "outcome.json").exists()
    cut_off = run / "checkpoints/.partial-step-00000008"  # a kill during a save leaves such a folder
    cut_off.mkdir(exist_ok=True)
    (cut_off / "rank-00000.00.master").write_bytes(b"half")

    heldout = [f"evaluate.shards={shards}", "evaluate.every_steps=5"]  # a validation must not change a bit
    output = finish(fork_ranks(2, command(recipe_file, shards, run, *heldout)))
    assert "its save was cut off" in output
    assert "heldout at step" in output
    assert "resuming from" in output
    assert not list((run / "checkpoints").glob(".partial*"))
    assert_same_end(run, undisturbed)


def test_resuming_skips_damaged_checkpoints_and_loads_the_newest_intact_one(recipe_file, shards, undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    checkpoints = run / "checkpoints"
    moments = checkpoints / folder_name(STEPS) / "rank-00001.00.exp_avg"
    flip_one_bit(moments)
    (checkpoints / folder_name(8) / "rank-00000.01.master").rename(checkpoints / "elsewhere")
    (run / "outcome.json").unlink()

    output = finish(fork_ranks(2, command(recipe_file, shards, run)))
    assert f"{moments.name} has changed" in output
    assert "is missing" in output
    assert f"resuming from {checkpoints / folder_name(4)}" in output
    assert_same_end(run, undisturbed)
    assert find_damage(checkpoints / folder_name(STEPS)) is None


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_stop_request_saves_a_checkpoint_and_resuming_repeats_no_step(recipe_file, shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = fork_ranks(2, command(recipe_file, shards, run))
    wait_for(lambda: losses(run), process)
    (run / "control/stop").touch()
    finish(process)
    stopped = outcome(run)
    assert (stopped["outcome"], stopped["reason"]) == ("stopped", "by hand")
    assert not (run / "control/stop").exists()
    assert stopped["step"] < STEPS
    assert list_steps(run / "checkpoints")[-1] == stopped["step"]

    heldout = [f"evaluate.shards={shards}", "evaluate.every_steps=1", "evaluate.samples=8"]
    finish(fork_ranks(2, command(recipe_file, shards, run, *heldout)))
    validated = [line["step"] for line in lines(run) if line.get("event") == "heldout"]
    assert validated == list(range(stopped["step"], STEPS + 1)), "the validation that the stop skipped is missing"
    assert len(losses(run)) == len([line for line in lines(run) if "event" not in line]), "a step was repeated"
    assert_same_end(run, undisturbed)


def test_a_changed_recipe_in_the_same_run_folder_is_an_error_and_changes_no_file(recipe_file, shards, undisturbed):
    before = [(undisturbed / name).read_bytes() for name in ("recipe.json", "outcome.json", "metrics.jsonl")]
    output = finish(fork_ranks(2, command(recipe_file, shards, undisturbed, "optim.lr=3e-3", "seed=8")), code=None)
    assert "optim.lr was 0.001, now 0.003" in output
    assert "seed was 7, now 8" in output
    assert [(undisturbed / name).read_bytes() for name in ("recipe.json", "outcome.json", "metrics.jsonl")] == before


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_over(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    words = command(recipe_file, shards, run, "steps=1")
    assert fork_python(*words).returncode == 0
    flip_one_bit(next(run.rglob("*.exp_avg_sq")))
    for _ in range(2):
        line = one_line(fork_python(*words), code=2)
        assert "holds no good checkpoint" in line
        assert "move this folder away" in line
        assert not (run / "control/starting").exists()


def test_a_launch_in_a_run_folder_locked_by_another_process_is_refused(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for job in ("77", "78"):
            second = fork_python(*command(recipe_file, shards, run), EMMA_JOB=job)
            assert "another process trains here" in one_line(second, code=2)
    assert not (run / "metrics.jsonl").exists()
    refusals = [line.split("\t") for line in (run / "control/refused").read_text().splitlines()]
    assert [job for job, _ in refusals] == ["77", "78"], "only the refused jobs must be recorded"
    assert "another process trains here" in refusals[0][1]


def test_exactly_one_of_two_simultaneous_launches_is_refused(recipe_file, tmp_path):
    """The first attempt uses a new run folder. The later attempts use the same folder again."""
    recipe = load_recipe(recipe_file, [f"run.dir={tmp_path / 'run'}"], planning=True)
    barrier = threading.Barrier(2)

    def start() -> RunFolder | UserError:
        barrier.wait()
        try:
            return RunFolder(recipe, Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
        except UserError as error:
            return error

    for _ in range(20):
        with ThreadPoolExecutor() as pool:
            results = [future.result() for future in [pool.submit(start), pool.submit(start)]]
        [run] = [result for result in results if isinstance(result, RunFolder)]
        run.lock.close()
        [error] = [result for result in results if isinstance(result, UserError)]
        assert "another process trains here" in str(error)


def test_an_error_on_the_main_rank_alone_ends_all_ranks_without_a_traceback(recipe_file, shards, tmp_path):
    (tmp_path / "file").touch()
    output = finish(fork_ranks(2, command(recipe_file, shards, tmp_path / "file/run")), code=1)
    assert "error: run.dir" in output
    assert "Traceback" not in output


def test_training_runs_in_a_single_process_without_torchrun(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    done = run_python(*command(recipe_file, shards, run, "steps=2", "engine.segment_layers=2", "data.workers=1"))
    assert done.returncode == 0, done.stderr
    assert outcome(run)["step"] == 2
    assert done.stderr == ""


def one_line(done, code):
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_each_user_error_is_reported_in_one_line(recipe_file, shards, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    closed = shutil.copytree(shards, tmp_path / "closed")
    (closed / "index.parquet").unlink()
    (closed / "index.parquet").mkdir()
    mistakes = [
        ([], closed, "run", [f"{closed}/index.parquet: Is a directory; check the path"]),
        ([f"engine.ds_config={'long' * 99}.json"], shards, "run", ["File name too long"]),
        (["optim.learning_rate=1"], shards, "run", ["'optim.learning_rate'", "valid keys here"]),
        ([], tmp_path / "empty", "run", ["manifest.json", "build_shards.py"]),
        ([], shards, "file/run", ["run.dir", "cannot be written"]),
        (["model=tiny_v1"], shards, "run", ["prompt template is 'base'", "'zephyr'"]),
        (["data.tokenizer=/no/such/tokenizer.json"], shards, "run", ["/no/such/tokenizer.json"]),
        (["engine.segment_layers=-1"], shards, "run", ["engine.segment_layers", "at least 0"]),
        (["optim.micro_batch=3"], shards, "run", ["global_batch 8", "micro_batch 3"]),
        (["engine.device=cuda"], shards, "run", ["no GPU"]),
    ]
    for overrides, data, run, expected in mistakes:
        line = one_line(fork_python(*command(recipe_file, data, tmp_path / run, *overrides)), code=2)
        for text in expected:
            assert text in line


def test_a_changed_shard_is_detected_before_training_begins(recipe_file, shards, tmp_path):
    replaced = tmp_path / "shards"
    shutil.copytree(shards, replaced)
    flip_one_bit(replaced / "shard-00001.tar")
    line = one_line(fork_python(*command(recipe_file, replaced, tmp_path / "run")), code=2)
    assert "shard-00001.tar: its checksum does not match the manifest" in line
    assert "preprocess.shardset verify" in line


def test_all_problems_with_a_recipe_are_reported_at_once(recipe_file, tmp_path):
    (tmp_path / "empty").mkdir()
    words = command(recipe_file, tmp_path / "empty", tmp_path / "run", "optim.micro_batch=3", "weights.llm=/no/where")
    errors = fork_python(*words).stderr
    for text in ("3 problems", "micro_batch 3", "manifest.json", "/no/where"):
        assert text in errors


def test_a_run_with_only_nonfinite_losses_fails_with_the_nonretryable_exit_code(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    done = fork_python(*command(recipe_file, shards, run, "optim.lr=1e30", "optim.clip=0.0"))
    assert "no finite loss" in one_line(done, code=3)
    assert outcome(run)["outcome"] == "failed"


def test_a_full_disk_while_logging_is_a_one_line_error(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    line = one_line(fork_python(*command(recipe_file, shards, run)), code=2)
    assert (
        line == f"error: {run}/metrics.jsonl: No space left on device; free some space, and run the same command again"
    )
    assert outcome(run)["outcome"] == "failed"


def test_an_error_keeps_its_exit_code_if_the_outcome_file_cannot_be_written(monkeypatch, capsys):
    class OnAFullDisk:
        first_step = 3

        def write_outcome(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.run.failure.os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        exit_after(UserError("no space"), None, None, cast(RunFolder, OnAFullDisk()))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no space\n"
