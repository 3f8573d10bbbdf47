"""Test batch jobs in one run folder that run tests/programs/slurm_training.py instead of real training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.slurm import NODES, REPOSITORY, SYSTEM_PATH, SlurmCluster, wait_until

SHARED_NODE, *OTHER_NODES = NODES  # tests that preempt, drain or stop a node use one of OTHER_NODES

RECIPE = """
import sys
print(next(word for word in sys.argv if word.startswith("run.dir="))[len("run.dir="):])
"""


def write_checkout(folder: Path) -> None:
    """Write a checkout with the real batch scripts, and with fast stand-ins for pipeline.recipe and pipeline.train."""
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (folder / "pipeline").mkdir()
    # Without this file, a `pipeline` package in the PYTHONPATH would be imported instead.
    (folder / "pipeline/__init__.py").touch()
    (folder / "pipeline/recipe.py").write_text(RECIPE)
    (folder / "pipeline/run").mkdir()
    shutil.copy(REPOSITORY / "pipeline/run/control.py", folder / "pipeline/run")
    shutil.copy(REPOSITORY / "tests/programs/slurm_training.py", folder / "pipeline/train.py")


class Training:
    """Submits batch jobs with two tasks that all use the same run folder."""

    def __init__(self, slurm: SlurmCluster, checkout: Path, run: Path) -> None:
        self.slurm, self.checkout, self.run = slurm, checkout, run

    def submit(self, *words: str, node: str = SHARED_NODE, **environment: str) -> str:
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
        """Wait for the job to end. Check its final state and its number of restarts. Return the log."""
        end_state, log = self.slurm.wait_for(job), self.slurm.log(job)
        assert (end_state, self.slurm.job(job)["Restarts"]) == (state, str(restarts)), log
        return log

    @property
    def outcome(self) -> str:
        return json.loads((self.run / "outcome.json").read_text())["outcome"]

    @property
    def reasons(self) -> list[str]:
        """The reason of each launch, read from control/starts.tsv."""
        return [line.split("\t")[3] for line in (self.run / "control/starts.tsv").read_text().splitlines()]


FAILING = """\
#!/usr/bin/env bash
case "$1" in {commands})
  echo >>"$0.$1"
  (($(wc -l <"$0.$1") > {times})) || {{ echo "no controller" >&2; exit 1; }} ;;
esac
exec {scontrol} "$@"
"""


def scontrol_fails(training: Training, *commands: str, times: int) -> str:
    """Return an EMMA_ENV that makes each given scontrol command fail `times` times at first, and disables `sleep`."""
    folder = training.run.with_name("bin")
    folder.mkdir()
    program = FAILING.format(
        commands="|".join(commands), times=times, scontrol=shutil.which("scontrol", path=SYSTEM_PATH)
    )
    for name, text in (("scontrol", program), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{training.slurm.environment['EMMA_ENV']}; export PATH={folder}:$PATH"
