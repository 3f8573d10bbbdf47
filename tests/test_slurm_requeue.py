"""Which ends of a job lead to a requeue: the real batch script on a real controller, with a program that only counts.

What the batch script goes by is the contract of `pipeline.train`: control/stop, checkpoints/latest, outcome.json and
the exit code. The program below keeps it and starts at once; real training is in test_slurm_train_emma.py.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.slurm_cluster import REPOSITORY, SlurmCluster, wait_until

RECIPE = """
import sys
print(next(word for word in sys.argv if word.startswith("run.dir="))[len("run.dir="):])
"""

# It never ends by itself, unless SLURM has restarted it `restarts` times.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

told = dict(word.split("=", 1) for word in sys.argv[2:])
run, rank, kind = Path(told["run.dir"]), int(os.environ["SLURM_PROCID"]), told.get("kind")
stop, latest = run / "control/stop", run / "checkpoints/latest"
signal.signal(signal.SIGTERM, lambda *_: stop.touch())
began, outcome = int(latest.read_text()[5:]) if latest.exists() else 0, "done"
step = began
(run / f"running-{rank}").touch()
while int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(told.get("restarts", 99)):
    time.sleep(0.1)
    if kind == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "failed":
        sys.exit(3)
    step += kind != "stuck"
    if stop.exists():
        outcome = "stopped"
        break
time.sleep(0.3)
(run / f"running-{rank}").unlink()
if rank == 0:
    latest.parent.mkdir(exist_ok=True)
    latest.write_text(f"step-{step:08d}\\n")
    (run / "outcome.json").write_text(json.dumps({"outcome": outcome, "step": step, "from_step": began, "reason": ""}))
    stop.unlink(missing_ok=True)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (folder / "pipeline").mkdir()
    for name, program in (("recipe", RECIPE), ("train", TRAIN)):
        (folder / f"pipeline/{name}.py").write_text(program)
    return folder


class Training:
    """Jobs of two tasks that train in one run folder."""

    def __init__(self, slurm: SlurmCluster, checkout: Path, run: Path) -> None:
        self.slurm, self.checkout, self.run = slurm, checkout, run

    def submit(self, *words: str, partition: str = "normal", **environment: str) -> str:
        size = ("--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--partition={partition}")
        options, overrides = ([w for w in words if w.startswith("--") == dashed] for dashed in (True, False))
        recipe = ("recipe.toml", f"run.dir={self.run}", *overrides)
        script = "slurm/train_emma.sh"
        return self.slurm.submit(*size, *options, script, *recipe, checkout=self.checkout, **environment)

    def wait_until_running(self) -> None:
        wait_until(lambda: len(list(self.run.glob("running-*"))) == 2, "both ranks to run")

    @property
    def outcome(self) -> str:
        return json.loads((self.run / "outcome.json").read_text())["outcome"]


@pytest.fixture
def training(slurm, checkout, tmp_path) -> Training:
    return Training(slurm, checkout, tmp_path / "run")


def test_near_its_time_limit_a_job_saves_requeues_itself_and_is_resumed(slurm, training):
    job = training.submit("--time=1", "--signal=B:USR1@45", "restarts=1")
    assert slurm.wait_for(job) == "COMPLETED"
    assert slurm.job(job)["Restarts"] == "1"
    assert "stopped at step" in slurm.log(job), "the second start must append to the log of the first"
    assert training.outcome == "done"


def test_a_job_is_requeued_no_more_often_than_allowed(slurm, training):
    job = training.submit(MAX_REQUEUES="1")
    for _ in range(2):
        training.wait_until_running()
        slurm.signal(job, "USR1")
        wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", "the requeue")
    assert slurm.wait_for(job) == "FAILED"
    assert f"job {job} was requeued 2 times, MAX_REQUEUES is 1" in slurm.log(job)


def test_scancel_ends_a_job_for_good_even_after_the_warning(slurm, training):
    job = training.submit()
    training.wait_until_running()
    slurm.signal(job, "USR1")
    slurm.run("scancel", job)
    assert slurm.wait_for(job) == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"


def test_a_stop_by_hand_stands_even_if_the_warning_comes_after_it(slurm, training):
    job = training.submit()
    training.wait_until_running()
    (training.run / "control/stop").touch()
    slurm.signal(job, "USR1")
    assert slurm.wait_for(job) == "COMPLETED"
    assert slurm.job(job)["Restarts"] == "0"
    assert training.outcome == "stopped"


def test_a_request_that_an_earlier_job_left_behind_is_forgotten(slurm, training):
    (training.run / "control").mkdir(parents=True)
    (training.run / "control/stop").touch()
    assert slurm.wait_for(training.submit("restarts=0")) == "COMPLETED"
    assert training.outcome == "done"


@pytest.mark.parametrize("partition", ["normal", "graceful"])
def test_a_preempted_job_goes_on_afterwards(slurm, training, partition):
    """Without grace time SLURM requeues it; with grace time it ends in time, and so has to do that itself."""
    job = training.submit("restarts=1", partition=partition)
    training.wait_until_running()
    slurm.preempt()
    assert slurm.wait_for(job) == "COMPLETED"
    assert slurm.job(job)["Restarts"] == "1"
    assert training.outcome == "done"


def test_restarts_that_lead_nowhere_come_to_an_end(slurm, training):
    job = training.submit("kind=stuck", MAX_FRUITLESS="1")
    training.wait_until_running()
    slurm.preempt()
    assert slurm.wait_for(job) == "FAILED"
    assert f"job {job} started 1 times at step 0 and never got further" in slurm.log(job)


@pytest.mark.parametrize(("kind", "code"), [("killed", "137:0"), ("failed", "3:0")])
def test_a_training_that_fails_is_not_tried_again(slurm, training, kind, code):
    job = training.submit(f"kind={kind}")
    assert slurm.wait_for(job) == "FAILED"
    assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == (code, "0")


def test_only_the_warned_task_of_an_array_is_requeued(slurm, training):
    training.run = training.run.with_name("run-%a")
    job = training.submit("--array=1-2", "restarts=1")
    runs = [training.run.with_name(f"run-{task}") for task in (1, 2)]
    wait_until(lambda: all(len(list(run.glob("running-*"))) == 2 for run in runs), "both tasks to run")
    slurm.signal(f"{job}_1", "USR1")
    assert slurm.wait_for(f"{job}_1") == "COMPLETED"
    assert slurm.job(f"{job}_2")["JobState"] == "RUNNING"
    assert (slurm.job(f"{job}_1")["Restarts"], slurm.job(f"{job}_2")["Restarts"]) == ("1", "0")
    slurm.run("scancel", job)


def test_two_jobs_do_not_train_in_one_run_folder(slurm, training):
    first = training.submit()
    training.wait_until_running()
    second = training.submit()
    assert slurm.wait_for(second) == "FAILED"
    assert f"job {first} trains here" in slurm.log(second)
    slurm.run("scancel", first)
