"""slurm/evaluate_emma.sh: events that requeue a job, with a stand-in for the evaluation, and a job that evaluates."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.slurm import NODES, REPOSITORY, SlurmCluster
from tests.support.tiny_benchmarks import write_benchmarks
from tests.support.tiny_model import save_tiny_model

SCRIPT = "slurm/evaluate_emma.sh"
TWO_TASKS = ("--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1")
JOBS: dict[str, tuple[str, ...]] = {
    "warned": (),
    "preempted": (f"--nodelist={NODES[6]}",),
    "killed": ("--end=killed",),
    "often killed": ("--end=killed", "--restarts=9"),
    "refused": ("--end=refused",),
    "cancelled": (),
}


@pytest.fixture(scope="module")
def jobs(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Submit all jobs, so that they run at the same time. Return the id and the folder of results of each."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "slurm", checkout / "slurm")
    (checkout / "pipeline").mkdir()
    (checkout / "pipeline/__init__.py").touch()
    shutil.copy(REPOSITORY / "tests/programs/slurm_evaluation.py", checkout / "pipeline/evaluate.py")
    submitted: dict[str, tuple[str, Path]] = {}
    for name, words in JOBS.items():
        out = tmp_path_factory.mktemp("out")
        options, arguments = ([w for w in words if w.startswith("--nodelist") == option] for option in (True, False))
        command: list[str | Path] = [*TWO_TASKS, *options, SCRIPT, "models/v2", "--out", out, *arguments]
        submitted[name] = slurm.submit(*command, checkout=checkout, MAX_REQUEUES="2"), out
    return submitted


@pytest.fixture
def wait_until_answering(slurm, jobs) -> Callable[[str], str]:
    """Return a function that waits until both tasks of a job have written an answer, and returns the job's id."""

    def wait(name: str) -> str:
        job, out = jobs[name]
        slurm.wait_during(job, lambda: len(list(out.glob("journal/*.jsonl"))) == 2, "both tasks to answer")
        return job

    return wait


def assert_end(slurm: SlurmCluster, job: str, state: str, restarts: int) -> str:
    """Check the final state of a job and its number of restarts. Return its log."""
    end, log = slurm.wait_for(job), slurm.log(job)
    assert (end, slurm.job(job)["Restarts"]) == (state, str(restarts)), log
    return log


def test_an_evaluation_near_its_time_limit_is_requeued_and_completes(slurm, wait_until_answering):
    job = wait_until_answering("warned")
    slurm.signal(job, "USR1")
    assert "near the time limit; requeued" in assert_end(slurm, job, "COMPLETED", restarts=1)


def test_a_preempted_evaluation_is_requeued_by_slurm_and_completes(slurm, wait_until_answering):
    job = wait_until_answering("preempted")
    slurm.preempt(NODES[6])
    assert_end(slurm, job, "COMPLETED", restarts=1)


def test_an_evaluation_with_a_killed_task_is_requeued_and_completes(slurm, jobs):
    assert "crashed with exit code 137; requeued" in assert_end(slurm, jobs["killed"][0], "COMPLETED", restarts=1)


def test_an_evaluation_is_requeued_at_most_max_requeues_times(slurm, jobs):
    log = assert_end(slurm, jobs["often killed"][0], "FAILED", restarts=2)
    assert "was requeued 2 times, the limit of MAX_REQUEUES" in log


def test_an_evaluation_that_computes_no_answer_is_not_requeued(slurm, jobs):
    assert "error: no answer was computed; not requeued" in assert_end(slurm, jobs["refused"][0], "FAILED", restarts=0)
    assert slurm.job(jobs["refused"][0])["ExitCode"] == "2:0"


def test_scancel_ends_an_evaluation_without_a_requeue(slurm, wait_until_answering):
    job = wait_until_answering("cancelled")
    slurm.run("scancel", job)
    assert_end(slurm, job, "CANCELLED", restarts=0)


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra [eval]")
def test_a_job_with_two_tasks_evaluates_a_model_on_a_benchmark(slurm, tmp_path):
    write_benchmarks(tmp_path / "data")
    model = save_tiny_model(tmp_path / "model")
    words = (model, "--tasks", "vsr", "--data", tmp_path / "data", "--device", "cpu")
    job = slurm.submit(*TWO_TASKS, SCRIPT, *words, HF_HOME=str(tmp_path / "cache"))
    assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
    results = json.loads((tmp_path / "model-evaluation/results.json").read_text())
    assert results["benchmarks"]["vsr"]["questions"] == 4
    journals = sorted((tmp_path / "model-evaluation/journal").iterdir())
    assert [path.name for path in journals] == ["vsr.0.jsonl", "vsr.1.jsonl"]
    assert [path.read_text().count("\n") for path in journals] == [3, 3], "each task answers half of the questions"


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "no model given"), (("models/v2", "--tasks", "all"), "this runs inside a SLURM job: sbatch")],
)
def test_the_script_outside_a_job_or_without_a_model_fails_with_one_line(slurm, words, message):
    done = slurm.run("bash", SCRIPT, *words, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
