"""Events that requeue a training job: the real batch script on a real SLURM cluster, with a stand-in for training.

The stand-in, tests/programs/slurm_training.py, starts quickly and produces what the batch script reads: the files in
control/, checkpoints/step-*/manifest.json, outcome.json and the exit code. test_slurm_train_emma.py tests jobs with
real training. All tests of this module run in parallel, because they spend most of their time waiting for SLURM.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.support.slurm import NODES, REPOSITORY, SlurmCluster, wait_until
from tests.support.slurm_training import OTHER_NODES, SHARED_NODE, Training, scontrol_fails, write_checkout

GOLDEN = REPOSITORY / "tests/golden"

Scenario = Callable[[Training], None]
SCENARIOS: dict[str, Scenario] = {}


def concurrent(scenario: Scenario) -> Callable[[dict[str, Future[None]]], None]:
    """Turn a scenario into a test that runs in parallel with the other scenarios."""
    SCENARIOS[scenario.__name__] = scenario

    def test(scenarios: dict[str, Future[None]]) -> None:
        scenarios[scenario.__name__].result()

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@pytest.fixture(scope="module")
def scenarios(
    request: pytest.FixtureRequest, slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    checkout = tmp_path_factory.mktemp("checkout")
    write_checkout(checkout)
    chosen = [item.name for item in request.session.items if item.name in SCENARIOS]
    with ThreadPoolExecutor(max_workers=len(chosen)) as pool:
        yield {
            name: pool.submit(SCENARIOS[name], Training(slurm, checkout, tmp_path_factory.mktemp("scenario") / "run"))
            for name in chosen
        }


@concurrent
def test_a_job_near_its_time_limit_saves_requeues_itself_and_resumes(training):
    job = training.submit_and_wait_until_running("--time=10", "--signal=B:USR1@45", "restarts=1")
    # SLURM checks time limits every 30 s and may send the signal 30 s early, so the test sets the limit only when the
    # script handles signals. The second launch has a limit of two minutes, so that it ends before any signal.
    training.slurm.run("scontrol", "update", f"jobid={job}", "EndTime=now+70")
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert "stopped at step" in log, "the second launch overwrote the log of the first launch"
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "warned of the time limit"]


@concurrent
def test_a_training_step_that_outlasts_the_time_limit_is_not_requeued(training):
    job = training.submit_and_wait_until_running("end=deaf")
    training.slurm.signal(job, "USR1")
    wait_until(lambda: (training.run / "control/stop").exists(), "the request")
    training.slurm.run("scontrol", "update", f"jobid={job}", "EndTime=now+2")
    log = training.assert_end(job, "TIMEOUT", restarts=0)
    assert "SIGUSR1: asked the run to save and stop" in log
    assert "DUE TO TIME LIMIT" in log


@concurrent
def test_a_usr1_signal_before_training_begins_fails_the_job_with_one_line(training):
    job = training.submit(EMMA_ENV="touch awake; sleep 1")
    wait_until(lambda: (training.checkout / "awake").exists(), "the script to run")
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "FAILED", restarts=0)
    assert log == "error: SIGUSR1 arrived before training began; --time must be longer than --signal\n"


@concurrent
def test_a_usr1_signal_before_the_first_step_fails_the_job_with_one_line(training):
    job = training.submit_and_wait_until_running("stuck=yes")
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "FAILED", restarts=0)
    assert "no step was finished between the start and the signal; --time must be longer than" in log


@concurrent
def test_usr1_signals_requeue_a_job_at_most_max_requeues_times(training):
    job = training.submit(MAX_REQUEUES="1")
    for _ in range(2):
        training.wait_until_running()
        training.slurm.signal(job, "USR1")
        wait_until(lambda: training.slurm.job(job)["JobState"] != "RUNNING", "the end of this start")
    log = training.assert_end(job, "FAILED", restarts=1)
    assert f"job {job} was requeued 1 times, the limit of MAX_REQUEUES" in log


@concurrent
def test_a_usr1_signal_sent_only_to_the_ranks_requeues_the_job(training):
    job = training.submit_and_wait_until_running("restarts=1")
    training.slurm.run("scancel", "--signal=USR1", job)
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert "by SIGUSR1\nby SIGUSR1; requeued" in log
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "by SIGUSR1"]


@concurrent
def test_scancel_ends_a_job_without_a_requeue_even_after_a_usr1_signal(training):
    for warned in (False, True):
        job = training.submit_and_wait_until_running()
        if warned:
            training.slurm.signal(job, "USR1")
        training.slurm.run("scancel", job)
        training.assert_end(job, "CANCELLED", restarts=0)


@concurrent
def test_a_manual_stop_prevents_a_requeue_in_the_same_job_but_not_in_the_next(training):
    job = training.submit_and_wait_until_running("exit_delay_s=5")  # keeps the job alive until the signal
    (training.run / "control/stop").touch()
    training.slurm.signal(job, "USR1")
    training.assert_end(job, "COMPLETED", restarts=0)
    assert training.outcome == "stopped"
    (training.run / "control/stop").touch()
    training.assert_end(training.submit("restarts=0"), "COMPLETED", restarts=0)
    assert training.outcome == "done"


@concurrent
def test_a_usr1_signal_while_manually_stopped_ranks_exit_does_not_requeue(training):
    job = training.submit_and_wait_until_running("exit_delay_s=5")
    (training.run / "control/stop").touch()
    wait_until(lambda: (training.run / "outcome.json").exists(), "the outcome")
    wait_until(lambda: not (training.run / "control/stop").exists(), "the request to be removed")
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "COMPLETED", restarts=0)
    assert "SIGUSR1: asked" in log, "the signal was sent after the end of the job"
    assert "by hand" in log
    assert training.outcome == "stopped"


@concurrent
def test_a_rank_killed_after_a_manual_stop_does_not_requeue_the_job(training):
    job = training.submit_and_wait_until_running("end=deaf")
    (training.run / "control/stop").touch()
    training.slurm.signal(job, "USR1")
    training.slurm.run("scancel", "--signal=KILL", f"{job}.0")
    assert "stopped by hand, but lost before the save was finished" in training.assert_end(job, "FAILED", restarts=0)


@concurrent
def test_a_save_request_does_not_end_the_job(training):
    job = training.submit_and_wait_until_running()
    (training.run / "control/save").touch()
    wait_until(lambda: not (training.run / "control/save").exists(), "the save")
    assert list((training.run / "checkpoints").glob("step-*/manifest.json"))
    assert training.slurm.job(job)["JobState"] == "RUNNING"
    training.slurm.run("scancel", job)


@concurrent
def test_a_job_preempted_without_grace_time_is_requeued_by_slurm(training):
    job = training.submit_and_wait_until_running("restarts=1", node=OTHER_NODES[0])
    training.slurm.preempt(OTHER_NODES[0])
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "by SLURM: preempted, or a node was lost"]


@concurrent
def test_a_job_preempted_with_grace_time_requeues_itself_until_stopped_manually(training):
    job = training.submit_and_wait_until_running("--partition=graceful", node=OTHER_NODES[1])
    training.slurm.preempt(OTHER_NODES[1])
    wait_until(lambda: not list(training.run.glob("running-*")), "the end of the first start")
    training.wait_until_running()
    assert training.reasons == ["submitted", "preempted"]
    (training.run / "control/stop").touch()
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.outcome == "stopped"


@concurrent
def test_restarts_by_slurm_without_training_progress_are_limited(training):
    job = training.submit_and_wait_until_running("stuck=yes", MAX_FRUITLESS="1", node=OTHER_NODES[2])
    training.slurm.preempt(OTHER_NODES[2])
    log = training.assert_end(job, "FAILED", restarts=1)
    assert f"job {job} started 1 times at step 0 without progress" in log


@concurrent
def test_a_requeued_job_avoids_a_drained_node_and_survives_a_lost_node(training):
    first, second = OTHER_NODES[3:5]
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


@concurrent
def test_damaged_outcome_and_latest_files_count_as_a_crash_and_requeue_the_job(training):
    (training.run / "checkpoints").mkdir(parents=True)
    (training.run / "checkpoints/latest").touch()
    log = training.assert_end(training.submit("end=garbage", "restarts=1"), "COMPLETED", restarts=1)
    assert "crashed with exit code 1; requeued" in log
    assert "Traceback" not in log


@concurrent
def test_a_killed_rank_requeues_the_job(training):
    job = training.submit("end=killed", "restarts=1", MAX_FRUITLESS="1")
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert "crashed with exit code 137; requeued" in log
    assert training.outcome == "done"


@concurrent
def test_a_job_whose_run_the_watchdog_ended_is_requeued(training):
    training.assert_end(training.submit("end=lost", "restarts=1"), "COMPLETED", restarts=1)
    assert training.outcome == "done"
    assert training.reasons == ["submitted", "step 2 took 900 s"]


@concurrent
def test_crashes_without_progress_are_limited_and_reported_in_one_line(training):
    job = training.submit("end=killed", "stuck=yes", MAX_FRUITLESS="2")
    log = training.assert_end(job, "FAILED", restarts=1)
    assert log.count("\nerror: ") == 1
    assert f"job {job} started 2 times at step 0 without progress: crashed with exit code 137; see" in log


@concurrent
def test_jobs_whose_training_failed_or_was_refused_are_not_requeued(training):
    """The refused job has the exit code of a rank that srun killed, and not the exit code of the rank that refused."""
    job = training.submit("end=failed")
    training.assert_end(job, "FAILED", restarts=0)
    assert training.slurm.job(job)["ExitCode"] == "3:0"
    log = training.assert_end(training.submit("end=refused"), "FAILED", restarts=0)
    assert f"error: {training.run}: training refused for the reason above; not requeued" in log


@concurrent
def test_a_refused_second_launch_does_not_prevent_the_requeue_of_the_first_job(training):
    job = training.submit_and_wait_until_running("restarts=1")
    second = ("--nodes=1", "--ntasks=2", f"--nodelist={SHARED_NODE}", sys.executable, "-m", "pipeline.train")
    words = ("recipe.toml", f"run.dir={training.run}", "end=refused")
    assert training.slurm.run("srun", *second, *words, cwd=training.checkout, EMMA_JOB=f"{job}0").returncode != 0
    assert (training.run / "control/refused").exists()
    training.slurm.signal(job, "USR1")
    training.assert_end(job, "COMPLETED", restarts=1)
    assert training.reasons == ["submitted", "warned of the time limit"]


@concurrent
def test_ranks_on_one_and_two_nodes_get_the_recorded_environment_variables(training):
    """With --export=EMMA_ENV, sbatch sets SLURM_EXPORT_ENV, which would make srun export EMMA_ENV only."""
    slurm_names = ("PROCID", "LOCALID", "NODEID", "STEP_NUM_TASKS")
    names = [*(f"SLURM_{name}" for name in slurm_names), "MASTER_ADDR", "SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS"]
    words = ["end=environment", "restarts=0", f"names={','.join(names)}", "--ntasks-per-node=8", "--cpus-per-task=8"]
    for nodes in (1, 2):
        training.run = training.run.with_name(f"run-{nodes}")
        where = (f"--nodes={nodes}", f"--nodelist={','.join(OTHER_NODES[5 : 5 + nodes])}", "--gpus-per-node=8")
        job = training.submit(*words, *where, "--export=EMMA_ENV")
        training.assert_end(job, "COMPLETED", restarts=0)
        environments = "".join(path.read_text() for path in sorted(training.run.glob("environment-*")))
        assert environments == (GOLDEN / f"slurm_environment_{nodes}x8.txt").read_text()


@concurrent
def test_a_usr1_signal_to_one_array_task_requeues_only_that_task(training):
    runs = [training.run.with_name(f"run-{task}") for task in (1, 2)]
    training.run = training.run.with_name("run-%a")
    job = training.submit("--array=1-2", "restarts=1")
    wait_until(lambda: all(len(list(run.glob("running-*"))) == 2 for run in runs), "both tasks to run")
    training.slurm.signal(f"{job}_1", "USR1")
    training.assert_end(f"{job}_1", "COMPLETED", restarts=1)
    other = training.slurm.job(f"{job}_2")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    training.slurm.run("scancel", job)


@concurrent
def test_a_job_is_requeued_although_scontrol_fails_once(training):
    job = training.submit("restarts=1", EMMA_ENV=scontrol_fails(training, "--oneliner", "requeue", times=1))
    training.wait_until_running()
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "COMPLETED", restarts=1)
    assert log.count("no controller") == 2


@concurrent
def test_a_job_fails_with_one_line_if_scontrol_requeue_always_fails(training):
    job = training.submit(EMMA_ENV=scontrol_fails(training, "requeue", times=99))
    training.wait_until_running()
    training.slurm.signal(job, "USR1")
    log = training.assert_end(job, "FAILED", restarts=0)
    assert log.endswith(f"error: job {job}: the controller did not requeue the job; submit it again to resume\n")


@concurrent
def test_a_new_job_does_not_inherit_the_restart_reason_of_a_cancelled_requeue(training):
    job = training.submit_and_wait_until_running()
    training.slurm.signal(job, "USR1")
    wait_until(lambda: training.slurm.job(job)["JobState"] == "PENDING", "the requeue")
    training.slurm.run("scancel", job)
    assert (training.run / "control/requeued").read_text() == f"{job}\twarned of the time limit\n"
    training.assert_end(training.submit("restarts=0"), "COMPLETED", restarts=0)
    assert training.reasons == ["submitted", "submitted"]


@concurrent
def test_a_second_job_in_the_run_folder_of_a_running_job_fails(training):
    first = training.submit_and_wait_until_running()
    assert f"job {first} is training in this folder" in training.assert_end(training.submit(), "FAILED", restarts=0)
    training.slurm.run("scancel", first)
