"""slurm/train_emma.sh: its dry run, and jobs with real training on two CPU ranks of a real SLURM cluster."""

import json
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.slurm import REPOSITORY

SCRIPT = "slurm/train_emma.sh"
STEPS = 8
ONE_NODE = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu7", "SLURM_JOB_NUM_NODES": "1"}
TWO_NODES = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_NUM_NODES": "2"}
TASK_OF_AN_ARRAY = {**ONE_NODE, "SLURM_ARRAY_JOB_ID": "4240", "SLURM_ARRAY_TASK_ID": "3"}

PLAN = """\
checkout     {checkout}
run folder   /runs/v2, at step 0
tasks        {tasks}, 8 CPUs each
environment  MASTER_ADDR={first} MASTER_PORT=24242
             SRUN_CPUS_PER_TASK=8 OMP_NUM_THREADS=8 EMMA_JOB=4242
command      'srun' '--export=ALL' '--label' '--kill-on-bad-exit=1' 'python' '-m' 'pipeline.train' \
'pipeline/recipes/emma_v2.toml' 'data.shards=/data/shards' 'run.dir=/runs/v2'
on USR1      touch /runs/v2/control/stop, wait for the save, scontrol requeue 4242
requeues     0 so far, at most 20
"""


@pytest.mark.parametrize("script", ["train_emma", "preprocess", "install_kernels", "evaluate_emma"])
def test_the_help_of_each_slurm_script_shows_examples_and_no_code(script):
    done = subprocess.run(["bash", f"slurm/{script}.sh", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(f"slurm/{script}.sh ") >= 3
    assert "EMMA_ENV" in done.stdout
    assert "SBATCH" not in done.stdout
    assert done.stdout.count("\n") < 25


def dry_run(slurm, *words, **environment):
    """Run the script in dry-run mode outside a job, with the given environment variables."""
    return slurm.run("bash", SCRIPT, *words, cwd=REPOSITORY, DRY_RUN="1", OMP_NUM_THREADS="", **environment)


@pytest.mark.parametrize(
    ("environment", "tasks", "first"),
    [(ONE_NODE, "8 = 1 nodes x 8", "gpu7"), (TWO_NODES, "16 = 2 nodes x 8", "gpu07")],
    ids=["1 node", "2 nodes"],
)
def test_a_dry_run_prints_tasks_environment_command_and_requeue_plan(slurm, environment, tasks, first):
    recipe = ("pipeline/recipes/emma_v2.toml", "data.shards=/data/shards", "run.dir=/runs/v2")
    plan = dry_run(slurm, *recipe, **environment)
    assert plan.stderr == ""
    assert plan.stdout == PLAN.format(checkout=REPOSITORY, tasks=tasks, first=first)


def test_an_array_task_puts_its_number_into_the_recipe_and_requeues_only_itself(slurm):
    recipe = ("pipeline/recipes/emma_v2.toml", "data.shards=/data/shards", "run.dir=/runs/seed-%a", "seed=%a")
    plan = dry_run(slurm, *recipe, **TASK_OF_AN_ARRAY).stdout
    assert "run folder   /runs/seed-3," in plan
    assert "'seed=3'" in plan
    assert "scontrol requeue 4240_3\n" in plan


PATTERNS = ("data.shards=/data/sh%ards", "run.dir=/runs/%j-%A-%x-%a")


def test_percent_patterns_in_paths_are_kept_if_there_is_no_array(slurm):
    plan = dry_run(slurm, "pipeline/recipes/emma_v2.toml", *PATTERNS, **ONE_NODE).stdout
    assert "run folder   /runs/%j-%A-%x-%a," in plan
    assert "'data.shards=/data/sh%ards' 'run.dir=/runs/%j-%A-%x-%a'" in plan


def test_an_array_task_refuses_a_path_in_which_a_letter_follows_the_number(slurm):
    plan = dry_run(slurm, "pipeline/recipes/emma_v2.toml", *PATTERNS, **TASK_OF_AN_ARRAY)
    assert (plan.returncode, plan.stdout) == (2, "")
    assert plan.stderr.startswith("error: data.shards=/data/sh%ards: %a is the number of the array task")


@pytest.mark.parametrize("latest", [b"", b"\n", b"gar\0bage\xff", b"step-00000099", None], ids=repr)
def test_the_step_of_a_run_is_that_of_its_newest_complete_checkpoint_folder(slurm, tmp_path, latest):
    checkpoints = tmp_path / "checkpoints"
    for step in ("00000004", "00000010"):
        (checkpoints / f"step-{step}").mkdir(parents=True)
        (checkpoints / f"step-{step}/manifest.json").touch()
    (checkpoints / "step-00000012").mkdir()  # has no manifest
    (checkpoints / "latest").mkdir() if latest is None else (checkpoints / "latest").write_bytes(latest)
    plan = dry_run(slurm, "pipeline/recipes/emma_v2.toml", "data.shards=/data", f"run.dir={tmp_path}")
    assert plan.stderr == ""
    assert f"run folder   {tmp_path}, at step 10\n" in plan.stdout


def test_the_emma_container_command_precedes_python(slurm):
    recipe = ("pipeline/recipes/emma_v2.toml", "data.shards=/data/shards", "run.dir=/runs/v2")
    plan = dry_run(slurm, *recipe, **ONE_NODE, EMMA_CONTAINER="env INSIDE=1").stdout
    assert "'--kill-on-bad-exit=1' 'env' 'INSIDE=1' 'python' '-m' 'pipeline.train'" in plan


def test_options_in_emma_srun_are_passed_to_srun(slurm):
    recipe = ("pipeline/recipes/emma_v2.toml", "data.shards=/data/shards", "run.dir=/runs/v2")
    image = "--container-image=/images/emma.sqsh --container-mounts=/data:/data"
    plan = dry_run(slurm, *recipe, **ONE_NODE, EMMA_SRUN=image).stdout
    words = "'--container-image=/images/emma.sqsh' '--container-mounts=/data:/data' '--label' '--kill-on-bad-exit=1'"
    assert f"'srun' '--export=ALL' {words} 'python' '-m' 'pipeline.train'" in plan


def test_a_dry_run_outside_a_job_uses_the_sbatch_directives_of_the_script(slurm):
    recipe = ("pipeline/recipes/emma_v2.toml", "data.shards=/data/shards", "run.dir=/runs/v2")
    plan = dry_run(slurm, *recipe)
    assert plan.returncode == 0, plan.stderr
    assert "tasks        8 = 1 nodes x 8, 8 CPUs each" in plan.stdout


@pytest.fixture
def submit(slurm, recipe_file, shards, tmp_path):
    """Return a function that submits a job that trains with two CPU tasks in the run folder tmp_path/run."""

    def submit(*words: str) -> str:
        options, overrides = ([w for w in words if w.startswith("--") == dashed] for dashed in (True, False))
        size = ("--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1")
        recipe = (recipe_file, f"data.shards={shards}", f"run.dir={tmp_path}/run", f"steps={STEPS}")
        return slurm.submit(*size, *options, SCRIPT, *recipe, *overrides)

    return submit


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in lines(run) if "event" not in line]


def assert_done(slurm, job, run, restarts):
    assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
    assert slurm.job(job)["Restarts"] == str(restarts)
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("done", STEPS)


def test_a_preempted_job_is_requeued_and_trains_every_step_exactly_once(slurm, submit, tmp_path):
    run = tmp_path / "run"
    job = submit("data.workers=1", "--partition=graceful")  # so that DataLoader workers receive the signal as well
    slurm.wait_during(job, lambda: steps_of(run), "the first step")
    slurm.preempt()
    assert_done(slurm, job, run, restarts=1)
    assert steps_of(run) == list(range(1, STEPS + 1))
    events = [line["event"] for line in lines(run) if line.get("event") in ("start", "stopped", "resume", "done")]
    assert events == ["start", "stopped", "resume", "done"]


def test_a_job_on_two_nodes_is_requeued_after_a_dataloader_worker_is_killed(slurm, submit, tmp_path):
    run = tmp_path / "run"
    job = submit("data.workers=1", "checkpoint.every_steps=2", "--nodes=2", "--ntasks-per-node=1")
    slurm.wait_during(job, (run / "checkpoints/latest").exists, "a checkpoint")
    children = [child for rank in ranks_of(run) for child in rank.children()]
    loading = next(child for child in children if "--multiprocessing-fork" in command_line(child))
    loading.kill()
    assert_done(slurm, job, run, restarts=1)
    assert f"DataLoader worker {loading.pid} " in slurm.log(job)
    assert "Traceback" not in slurm.log(job)
    assert sorted(set(steps_of(run))) == list(range(1, STEPS + 1))


def test_a_job_with_a_killed_rank_resumes_from_the_newest_checkpoint(slurm, submit, tmp_path):
    run = tmp_path / "run"
    job = submit("checkpoint.every_steps=2")
    slurm.wait_during(job, (run / "metrics.jsonl").exists, "the loop")
    [rank] = [rank for rank in ranks_of(run) if rank.environ().get("SLURM_PROCID") == "1"]
    slurm.wait_during(job, (run / "checkpoints/latest").exists, "a checkpoint")
    rank.kill()
    assert_done(slurm, job, run, restarts=1)
    assert "Traceback" not in slurm.log(job)
    [first, second] = [line.split("\t") for line in (run / "control/starts.tsv").read_text().splitlines()]
    assert (first[3], int(first[2])) == ("submitted", 0)
    assert second[3] in ("rank 1 has ended", "crashed with exit code 137"), (
        "expected the reason of the watchdog or of srun"
    )
    assert int(second[2]) >= 2
    assert steps_of(run).count(1) == 1, "training started over at step 1"
    assert sorted(set(steps_of(run))) == list(range(1, STEPS + 1))


def ranks_of(run: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if {"pipeline.train", f"run.dir={run}"} <= set(command_line(p))]


def command_line(process: psutil.Process) -> list[str]:
    """Return the words of the command line of a process, or an empty list if the process has ended."""
    try:
        return " ".join(process.cmdline()).split()
    except psutil.Error:
        return []


def test_a_job_with_preflight_problems_reports_all_of_them_and_is_not_requeued(slurm, submit):
    job = submit("optim.micro_batch=3", "weights.llm=/no/where")
    assert slurm.wait_for(job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    assert slurm.log(job).count("2 problems") == 1
    assert "Traceback" not in slurm.log(job)


def test_an_invalid_recipe_key_fails_the_job_with_one_line(slurm, submit, tmp_path):
    job = submit("optim.lrr=1")
    assert slurm.wait_for(job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    assert slurm.log(job).startswith("error: ")
    assert "did you mean 'optim.lr'" in slurm.log(job)
    assert slurm.log(job).count("\n") == 1


def test_a_job_submitted_outside_a_checkout_fails(slurm, tmp_path):
    job = slurm.submit(REPOSITORY / SCRIPT, "recipe.toml", checkout=tmp_path)
    assert slurm.wait_for(job) == "FAILED"
    assert "is not a checkout; call sbatch in a checkout" in slurm.log(job)
