"""Which ends of a job lead to a requeue: the real batch script on a real controller, with a program that only counts.

What the batch script goes by is the contract of `pipeline.train`: the files in control/, checkpoints/latest,
outcome.json and the exit code. The program below keeps it and starts at once; real training is in
test_slurm_train_emma.py. Most of the time is SLURM's own waiting, so all stories are told side by side.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm_cluster import NODES, REPOSITORY, SlurmCluster, wait_until

CALM, *STORMY = NODES
GOLDEN = REPOSITORY / "tests/golden"

RECIPE = """
import sys
print(next(word for word in sys.argv if word.startswith("run.dir="))[len("run.dir="):])
"""

# It trains until it is told to stop, or until SLURM has restarted it `restarts` times; before, it may `end` otherwise.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

told = dict(word.split("=", 1) for word in sys.argv[2:])
run, rank, end = Path(told["run.dir"]), int(os.environ["SLURM_PROCID"]), told.get("end", "")
stop, save, latest = run / "control/stop", run / "control/save", run / "checkpoints/latest"
terminated = []  # by a preemption, or because another rank died; then all collectives hang
signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
step = began = int(latest.read_text()[5:]) if latest.exists() else 0

def checkpoint():
    if rank == 0:
        latest.parent.mkdir(exist_ok=True)
        latest.with_name("new").write_text(f"step-{step:08d}\\n")
        latest.with_name("new").replace(latest)

def leave(outcome, code, reason=""):
    if rank == 0:
        word = {"outcome": outcome, "step": step, "from_step": began, "reason": reason}
        (run / "outcome.json").write_text(json.dumps(word))
        stop.unlink(missing_ok=True)
    sys.exit(code)

if end == "environment":
    told_by_slurm = " ".join(f"{name}={os.environ[name]}" for name in told["names"].split(","))
    (run / f"environment-{rank:02}").write_text(told_by_slurm + "\\n")
if rank == 0:
    (run / "outcome.json").unlink(missing_ok=True)
(run / f"running-{rank}").touch()
until = time.monotonic() + 300  # should the cluster be gone
while time.monotonic() < until and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(told.get("restarts", 99)):
    time.sleep(0.1)
    step += "stuck" not in told
    if "stuck" not in told and end in ("killed", "lost"):
        checkpoint()
    if rank == 1 and end == "killed":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "lost":
        leave("lost", 4, "step 2 took 900 s")
    if end == "failed":
        leave("failed", 3)
    if end == "refused":
        if rank == 1:
            time.sleep(9)  # and is killed by then
        with (run / "control/refused").open("a") as file:
            file.write(f"{os.environ['SLURM_JOB_ID']}\\tmicro_batch is 3\\n")
        sys.exit(2)
    if save.exists():
        checkpoint()
        save.unlink(missing_ok=True)
    if (stop.exists() or terminated) and end not in ("deaf", "killed"):
        time.sleep(0.3)
        (run / f"running-{rank}").unlink()
        checkpoint()
        leave("stopped", 0)
checkpoint()
leave("done", 0)
"""


class Training:
    """Jobs of two tasks that train in one run folder."""

    def __init__(self, slurm: SlurmCluster, checkout: Path, run: Path) -> None:
        self.slurm, self.checkout, self.run = slurm, checkout, run

    def submit(self, *words: str, node: str = CALM, **environment: str) -> str:
        options, overrides = ([w for w in words if w.startswith("--") == dashed] for dashed in (True, False))
        size = ("--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1")
        where = () if any("exclude" in word or "nodes" in word for word in options) else (f"--nodelist={node}",)
        recipe = ("recipe.toml", f"run.dir={self.run}", *overrides)
        script = "slurm/train_emma.sh"
        return self.slurm.submit(*size, *where, *options, script, *recipe, checkout=self.checkout, **environment)

    def wait_until_running(self) -> None:
        wait_until(lambda: len(list(self.run.glob("running-*"))) == 2, "both ranks to run")

    def submit_and_wait_until_running(self, *words: str, **more: str) -> str:
        for mark in self.run.glob("running-*"):
            mark.unlink()
        job = self.submit(*words, **more)
        self.wait_until_running()
        return job

    def assert_end(self, job: str, state: str, restarts: int) -> str:
        """The job's log, for more."""
        ended, log = self.slurm.wait_for(job), self.slurm.log(job)
        assert (ended, self.slurm.job(job)["Restarts"]) == (state, str(restarts)), log
        return log

    @property
    def outcome(self) -> str:
        return json.loads((self.run / "outcome.json").read_text())["outcome"]

    @property
    def reasons(self) -> list[str]:
        """Why each start came about."""
        return [line.split("\t")[3] for line in (self.run / "control/starts.tsv").read_text().splitlines()]


Story = Callable[[Training], None]
STORIES: dict[str, Story] = {}


def side_by_side(story: Story) -> Callable[[dict[str, Future[None]]], None]:
    """A test that is told while the others are."""
    STORIES[story.__name__] = story

    def test(told: dict[str, Future[None]]) -> None:
        told[story.__name__].result()

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


@pytest.fixture(scope="module")
def told(
    request: pytest.FixtureRequest, slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "slurm", checkout / "slurm")
    (checkout / "pipeline").mkdir()
    for name, program in (("recipe", RECIPE), ("train", TRAIN)):
        (checkout / f"pipeline/{name}.py").write_text(program)
    chosen = [item.name for item in request.session.items if item.name in STORIES]
    with ThreadPoolExecutor(max_workers=len(chosen)) as pool:
        yield {
            name: pool.submit(STORIES[name], Training(slurm, checkout, tmp_path_factory.mktemp("story") / "run"))
            for name in chosen
        }


@side_by_side
def test_near_its_time_limit_a_job_saves_requeues_itself_and_is_resumed(training):
    job = training.submit("--time=1", "--signal=B:USR1@45", "restarts=1")
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert "stopped at step" in log, "the second start must append to the log of the first"
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "warned of the time limit"]


@side_by_side
def test_a_step_that_takes_longer_than_the_job_may_ends_it_and_starts_no_endless_loop(training):
    job = training.submit_and_wait_until_running("--time=1", "--signal=B:USR1@45", "end=deaf")
    training.slurm.run("scontrol", "update", f"jobid={job}", "EndTime=now+2")
    assert "DUE TO TIME LIMIT" in training.assert_end(job, "TIMEOUT", restarts=0)


@side_by_side
def test_a_warning_that_comes_before_training_begins_ends_the_job_with_one_line(training):
    job = training.submit(EMMA_ENV="touch awake; sleep 1")
    wait_until(lambda: (training.checkout / "awake").exists(), "the script to run")
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "FAILED", restarts=0)
    assert log == "error: SIGUSR1 came before training began; give the job more --time than --signal takes\n"


@side_by_side
def test_a_warning_before_the_first_step_is_done_ends_the_job_with_one_line(training):
    job = training.submit_and_wait_until_running("stuck=yes")
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "FAILED", restarts=0)
    assert "not one step from the start to the signal; give the job more --time" in log


@side_by_side
def test_scancel_signal_requeues_a_job_but_no_more_often_than_allowed(training):
    job = training.submit(MAX_REQUEUES="1")
    for _ in range(2):
        training.wait_until_running()
        training.slurm.signal(job, "USR1")
        wait_until(lambda: training.slurm.job(job)["JobState"] != "RUNNING", "the end of this start")
    log = training.assert_end(job, "FAILED", restarts=1)
    assert f"job {job} was requeued 1 times, as often as MAX_REQUEUES allows" in log


@side_by_side
def test_scancel_ends_a_job_for_good_with_and_without_a_warning_before(training):
    for warned in (False, True):
        job = training.submit_and_wait_until_running()
        if warned:
            training.slurm.signal(job, "USR1")
        training.slurm.run("scancel", job)
        training.assert_end(job, "CANCELLED", restarts=0)


@side_by_side
def test_a_stop_by_hand_stands_even_if_the_warning_comes_after_it_and_is_forgotten_by_the_next_job(training):
    job = training.submit_and_wait_until_running()
    (training.run / "control/stop").touch()
    training.slurm.signal(job, "USR1")
    training.assert_end(job, "COMPLETED", restarts=0)
    assert training.outcome == "stopped"
    (training.run / "control/stop").touch()
    training.assert_end(training.submit("restarts=0"), "COMPLETED", restarts=0)
    assert training.outcome == "done"


@side_by_side
def test_a_save_by_hand_leaves_the_job_running(training):
    job = training.submit_and_wait_until_running()
    (training.run / "control/save").touch()
    wait_until(lambda: not (training.run / "control/save").exists(), "the save")
    assert (training.run / "checkpoints/latest").exists()
    assert training.slurm.job(job)["JobState"] == "RUNNING"
    training.slurm.run("scancel", job)


@side_by_side
def test_a_preempted_job_without_grace_time_is_requeued_by_slurm(training):
    job = training.submit_and_wait_until_running("restarts=1", node=STORMY[0])
    training.slurm.preempt(STORMY[0])
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "by SLURM: preempted, or a node was lost"]


@side_by_side
def test_a_preempted_job_with_grace_time_ends_in_time_and_so_requeues_itself_but_not_after_a_stop_by_hand(training):
    job = training.submit_and_wait_until_running("--partition=graceful", node=STORMY[1])
    training.slurm.preempt(STORMY[1])
    wait_until(lambda: not list(training.run.glob("running-*")), "the end of the first start")
    training.wait_until_running()
    assert training.reasons == ["submitted", "preempted"]
    (training.run / "control/stop").touch()
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.outcome == "stopped"


@side_by_side
def test_restarts_by_slurm_that_lead_nowhere_come_to_an_end(training):
    job = training.submit_and_wait_until_running("stuck=yes", MAX_FRUITLESS="1", node=STORMY[2])
    training.slurm.preempt(STORMY[2])
    log = training.assert_end(job, "FAILED", restarts=1)
    assert f"job {job} started 1 times at step 0 and never got further" in log


@side_by_side
def test_a_job_leaves_a_drained_node_and_survives_a_lost_one(training):
    first, second = STORMY[3:5]
    elsewhere = ",".join(set(NODES) - {first, second})
    job = training.submit_and_wait_until_running(f"--exclude={elsewhere}", "restarts=2")
    assert training.slurm.job(job)["NodeList"] == first
    training.slurm.update_node(first, "drain")
    training.slurm.signal(job, "USR1")
    wait_until(lambda: training.slurm.job(job)["NodeList"] == second, "the start on the other node")
    training.wait_until_running()
    training.slurm.update_node(first, "resume")
    training.slurm.update_node(second, "down")
    training.assert_end(job, "COMPLETED", restarts=2)
    assert training.slurm.job(job)["NodeList"] == first
    assert training.reasons[1:] == ["warned of the time limit", "by SLURM: preempted, or a node was lost"]


@side_by_side
def test_a_rank_that_is_killed_is_tried_again(training):
    job = training.submit("end=killed", "restarts=1", MAX_FRUITLESS="1")
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert "crashed with exit code 137; requeued" in log
    assert training.outcome == "done"


@side_by_side
def test_a_run_that_its_watchdog_gave_up_is_tried_again(training):
    training.assert_end(training.submit("end=lost", "restarts=1"), "COMPLETED", restarts=1)
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "step 2 took 900 s"]


@side_by_side
def test_crashes_without_progress_come_to_an_end_with_one_line(training):
    job = training.submit("end=killed", "stuck=yes", MAX_FRUITLESS="2")
    log = training.assert_end(job, "FAILED", restarts=1)
    assert log.count("\nerror: ") == 1
    assert f"job {job} started 2 times at step 0 and never got further: crashed with exit code 137; look at" in log


@side_by_side
def test_what_trying_again_would_not_mend_is_not_tried_again(training):
    """Refused: by a rank whose exit code is not the job's, because the launcher killed another."""
    job = training.submit("end=failed")
    training.assert_end(job, "FAILED", restarts=0)
    assert training.slurm.job(job)["ExitCode"] == "3:0"
    log = training.assert_end(training.submit("end=refused"), "FAILED", restarts=0)
    assert f"error: {training.run}: training refused, as the ranks have said above; not requeued" in log


@side_by_side
def test_a_start_that_is_refused_because_a_job_trains_there_costs_that_job_no_requeue(training):
    job = training.submit_and_wait_until_running("restarts=1")
    second = ("--nodes=1", "--ntasks=2", f"--nodelist={CALM}", sys.executable, "-m", "pipeline.train")
    words = ("recipe.toml", f"run.dir={training.run}", "end=refused")
    assert training.slurm.run("srun", *second, *words, cwd=training.checkout).returncode != 0
    assert (training.run / "control/refused").exists()
    training.slurm.signal(job, "USR1")
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.reasons == ["submitted", "warned of the time limit"]


@side_by_side
def test_every_rank_of_one_and_of_two_nodes_is_told_who_it_is(training):
    of_slurm = ("PROCID", "LOCALID", "NODEID", "NTASKS")
    names = [*(f"SLURM_{name}" for name in of_slurm), "MASTER_ADDR", "SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS"]
    words = ["end=environment", "restarts=0", f"names={','.join(names)}", "--ntasks-per-node=8", "--cpus-per-task=8"]
    for nodes in (1, 2):
        training.run = training.run.with_name(f"run-{nodes}")
        where = (f"--nodes={nodes}", f"--nodelist={','.join(STORMY[5 : 5 + nodes])}", "--gpus-per-node=8")
        job = training.submit(*words, *where, OMP_NUM_THREADS="")
        training.assert_end(job, "COMPLETED", restarts=0)
        found = "".join(path.read_text() for path in sorted(training.run.glob("environment-*")))
        assert found == (GOLDEN / f"slurm_environment_{nodes}x8.txt").read_text()


@side_by_side
def test_only_the_warned_task_of_an_array_is_requeued(training):
    runs = [training.run.with_name(f"run-{task}") for task in (1, 2)]
    training.run = training.run.with_name("run-%a")
    job = training.submit("--array=1-2", "restarts=1")
    wait_until(lambda: all(len(list(run.glob("running-*"))) == 2 for run in runs), "both tasks to run")
    training.slurm.signal(f"{job}_1", "USR1")
    training.assert_end(f"{job}_1", "COMPLETED", restarts=1)
    other = training.slurm.job(f"{job}_2")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    training.slurm.run("scancel", job)


@side_by_side
def test_two_jobs_do_not_train_in_one_run_folder(training):
    first = training.submit_and_wait_until_running()
    assert f"job {first} trains here" in training.assert_end(training.submit(), "FAILED", restarts=0)
    training.slurm.run("scancel", first)
