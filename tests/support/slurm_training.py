"""Batch jobs of the tests that train in one run folder, with slurm_program.py for the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.slurm import NODES, REPOSITORY, SYSTEM_PATH, SlurmCluster, wait_until

CALM, *STORMY = NODES

RECIPE = """
import sys
print(next(word for word in sys.argv if word.startswith("run.dir="))[len("run.dir="):])
"""


def write_checkout(folder: Path) -> None:
    """The real scripts and the real control files, with a recipe and a training that start at once."""
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (folder / "pipeline").mkdir()
    (folder / "pipeline/__init__.py").touch()  # else a `pipeline` in the PYTHONPATH would go before this one
    (folder / "pipeline/recipe.py").write_text(RECIPE)
    (folder / "pipeline/run").mkdir()
    shutil.copy(REPOSITORY / "pipeline/run/control.py", folder / "pipeline/run")
    shutil.copy(REPOSITORY / "tests/programs/slurm_training.py", folder / "pipeline/train.py")


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


FAILING = """\
#!/usr/bin/env bash
case "$1" in {commands})
  echo >>"$0.$1"
  (($(wc -l <"$0.$1") > {times})) || {{ echo "no controller" >&2; exit 1; }} ;;
esac
exec {scontrol} "$@"
"""


def scontrol_fails(training: Training, *commands: str, times: int) -> str:
    """EMMA_ENV for a job in which scontrol fails so many times in each of the commands. Nobody sleeps in it."""
    folder = training.run.with_name("bin")
    folder.mkdir()
    program = FAILING.format(
        commands="|".join(commands), times=times, scontrol=shutil.which("scontrol", path=SYSTEM_PATH)
    )
    for name, text in (("scontrol", program), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{training.slurm.environment['EMMA_ENV']}; export PATH={folder}:$PATH"
