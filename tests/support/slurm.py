"""A real SLURM cluster on the local machine for tests: a controller and eight nodes with eight simulated GPUs each.

The cluster needs no systemd, no root permission and no fixed ports. All files of the daemons are in one folder.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.demo.processes import free_ports
from tests.support.launch import REPOSITORY

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# The names are addresses, because ranks connect to the first node by its name.
NODES = [f"127.0.0.{i}" for i in range(1, 9)]
POLL_S = 0.2
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

T = TypeVar("T")

# cred_expire: a requeued job waits until its old credential has expired, which takes two minutes by default; 5 s is the
# minimum. FirstJobId is random, because ports depend on job ids and another cluster may run on the same machine.
# CPUs: each node declares more CPUs than the machine has, so that eight tasks fit. Jobs of the partition `urgent`
# preempt jobs of the other partitions, which SLURM then requeues.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=0
PartitionName=graceful Nodes=ALL PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} Weight={weight} CPUs=64 Gres=gpu:8\n"


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


class SlurmCluster:
    """Context manager that starts and stops the SLURM daemons. Commands find the cluster through `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": SYSTEM_PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "EMMA_ENV": f"export PATH={Path(sys.executable).parent}:$PATH",
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.lock = threading.Lock()
        self.jobs: dict[str, dict[str, str]] = {}
        self.asked = -POLL_S

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_options())
            wait_until(lambda: (self.folder / "munge.socket").exists(), "munged to listen")
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
            wait_until(lambda: set(self._ask("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("scancel", f"--user={getpass.getuser()}")
        # Stop the nodes first, then the controller, then munged.
        for daemons in (self.daemons[2:], self.daemons[1:2], self.daemons[:1]):
            for daemon in daemons:
                daemon.terminate()
            for daemon in daemons:
                _wait_or_kill(daemon)

    def submit(self, *words: str | Path, checkout: Path = REPOSITORY, **environment: str) -> str:
        """Run `sbatch WORDS` in a checkout. Return the job id."""
        result = self.run(
            "sbatch", "--parsable", f"--output={self.folder}/%A-%a.log", *words, cwd=checkout, **environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def run(self, *words: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        environment, command = {**self.environment, **more}, [str(word) for word in words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def job(self, job: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints for a job."""
        with self.lock:  # all tests that wait at the same time share one query
            if time.monotonic() - self.asked > POLL_S:
                self.jobs = {}
                for line in self._ask("scontrol", "--oneliner", "show", "jobs").splitlines():
                    facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
                    self.jobs[_name(facts)] = facts
                self.asked = time.monotonic()
            return self.jobs.get(job, {})

    def wait_for(self, job: str, timeout_s: float = 240) -> str:
        """Wait for the final end of a job, after all its requeues. Return the final state."""
        return wait_until(lambda: self._end_of(job), f"job {job} to end", timeout_s)

    def wait_during(self, job: str, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition` holds. If the job ends before that, fail and show the log of the job."""

        def look() -> bool:
            assert self._end_of(job) is None, self.log(job)
            return bool(condition())

        wait_until(look, what)

    def log(self, job: str) -> str:
        return Path(self.job(job)["StdOut"]).read_text()

    def signal(self, job: str, name: str) -> None:
        """Send a signal to the batch script only, as SLURM does before the time limit with --signal=B:…"""
        assert self.run("scancel", f"--signal={name}", "--batch", job).returncode == 0

    def preempt(self, node: str = NODES[0]) -> None:
        """Preempt the jobs on a node: run a job of higher priority that needs the whole node, and wait for its end."""
        self.wait_for(self.submit("--partition=urgent", f"--nodelist={node}", "--cpus-per-task=64", "--wrap=true"))

    def update_node(self, node: str, state: str) -> None:
        assert self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test").returncode == 0

    def _end_of(self, job: str) -> str | None:
        state = self.job(job).get("JobState", "")
        return state if state in FINISHED else None

    def _ask(self, *command: str) -> str:
        return self.run(*command).stdout

    def _configure(self) -> None:
        for name in ("state", "gpus", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for gpu in range(8):
            (self.folder / "gpus" / f"nvidia{gpu}").symlink_to("/dev/null")  # SLURM requires a device file for each GPU
        controller_port, *ports = free_ports(1 + len(NODES))
        first = random.randrange(1, 1_000_000)
        text = SLURM_CONF.format(
            folder=self.folder, user=getpass.getuser(), controller_port=controller_port, first_job=first
        )
        nodes = zip(NODES, ports, range(len(NODES)), strict=True)  # SLURM prefers idle nodes with a low weight
        text += "".join(NODE.format(name=name, port=port, weight=weight + 1) for name, port, weight in nodes)
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"Name=gpu File={self.folder}/gpus/nvidia[0-7]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _munge_options(self) -> list[str]:
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]

    def _start(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("wb")
        with output:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))


def _name(facts: dict[str, str]) -> str:
    """Return the id of a job, or ARRAYJOB_TASK for a task of a job array."""
    return f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}" if "ArrayTaskId" in facts else facts.get("JobId", "")


def _wait_or_kill(daemon: subprocess.Popen[bytes]) -> None:
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def wait_until(condition: Callable[[], T | None], what: str, timeout_s: float = 240) -> T:
    """Wait until `condition` returns a true value, and return the value. A timeout error shows `what`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
