"""The multi-GPU benchmark, rehearsed on CPU ranks with the tiny preset, and its tables."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import multi_gpu, resume
from benchmarks.multi_gpu_table import table
from tests.support.fork_server import ForkedProgram
from tests.support.launch import fork_python, fork_ranks
from tests.support.tiny_data import TINY_RECIPE


@pytest.fixture
def run_stage(tmp_path, monkeypatch):
    """Yield a function that runs a stage with two ranks and returns its results. Processes are forks."""

    programs: list[ForkedProgram] = []

    def launch(words: list[str], **_: object) -> ForkedProgram:
        [ranks] = [word.partition("=")[2] for word in words if word.startswith("--nproc-per-node=")]
        programs.append(fork_ranks(int(ranks), ["-m", *words[words.index("benchmarks.limited_training") :]]))
        return programs[-1]

    monkeypatch.setattr(resume, "subprocess", SimpleNamespace(Popen=launch, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(multi_gpu, "subprocess", SimpleNamespace(run=lambda words, **_: fork_python(*words[1:])))
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_RECIPE)

    def run(stage: str, *words: str) -> dict:
        folders = ["--folder", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
        sizes = ["--ranks", "2", "--micro-batch", "4", "--images", "2", "--recipes", str(recipe), str(recipe)]
        monkeypatch.setattr(sys, "argv", ["multi_gpu", "--stage", stage, *folders, *sizes, *words])
        multi_gpu.main()
        return json.loads((tmp_path / "out" / f"{stage}.json").read_text())

    yield run
    for program in programs:
        program.communicate()  # closes its files


def test_the_speed_stage_times_steps_and_compares_them_with_a_dry_run(run_stage):
    stage = run_stage("speed_v2", "--steps", "5")
    [row] = stage["results"]
    assert (row["ranks"], row["micro_batch"], row["global_batch"], row["steps"]) == (2, 4, 8, 4)
    assert row["step_s"] > 0 < row["samples_per_s"]
    assert row["predicted"]["step_s"] > 0
    assert "| v2 | zero3 | 2 | 4 |" in table({"speed_v2": stage})


def test_the_resume_stage_gives_the_same_losses_on_two_ranks_and_on_one(run_stage):
    found = run_stage("resume")["results"]
    resumes = ("resume", "resume_on_half", "resume_after_lost_rank")
    assert [found[name]["step"] for name in resumes] == [multi_gpu.SAVE_AT] * 3
    assert len(found["resume"]["losses"]) == multi_gpu.STEPS_AFTER
    for name in resumes[1:]:
        assert found[name]["losses"] == pytest.approx(found["resume"]["losses"], rel=1e-4)
    assert found["lost_rank"]["outcome"]["outcome"] == "lost"
    assert (found["stop"]["outcome"], found["stop"]["exit_code"]) == ("stopped", 0)
    assert "| resume on half the ranks |" in table({"resume": {"gpu": "CPU", "ranks": 2, "results": found}})
