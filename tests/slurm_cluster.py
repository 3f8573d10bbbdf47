"""A real SLURM on this machine for the length of the tests: one controller, one node, eight GPUs in name only.

No systemd, no root, no fixed port: munged, slurmctld and slurmd live in a folder of their own and are ended by pid.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

T = TypeVar("T")

# Requeued jobs wait until their old credential has expired: two minutes by default, five seconds here.
# The node claims more CPUs than there are, so that eight tasks fit. `urgent` preempts `normal` by requeueing it.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
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
NodeName=localhost CPUs=64 RealMemory=4000 Gres=gpu:8
PartitionName=normal Nodes=localhost Default=YES PriorityTier=1 GraceTime=0
PartitionName=graceful Nodes=localhost PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


class SlurmCluster:
    """Starts on entry, ends on exit; `environment` makes every SLURM command in it talk to this cluster."""

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

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_options())
            wait_until(lambda: (self.folder / "munge.socket").exists(), "munged to listen")
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            self._start("slurmd", "-D", "-N", "localhost", "-f", str(self.folder / "slurm.conf"))
            wait_until(lambda: "idle" in self._ask("sinfo", "--noheader", "--format=%T"), "the node to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("scancel", f"--user={getpass.getuser()}")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(self, *words: str | Path, checkout: Path = REPOSITORY, **environment: str) -> str:
        """`sbatch …` in a checkout, with this Python; the job's id."""
        result = self.run(
            "sbatch", "--parsable", f"--output={self.folder}/%A-%a.log", *words, cwd=checkout, **environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def run(self, *words: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        environment, command = {**self.environment, **more}, [str(word) for word in words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def job(self, job: str) -> dict[str, str]:
        """What the controller says of a job, by the names of `scontrol show job`."""
        words = self._ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, timeout_s: float = 240) -> str:
        """The state in which the job ended. A requeued job has not ended."""
        return wait_until(lambda: self._end_of(job), f"job {job} to end", timeout_s)

    def log(self, job: str) -> str:
        return Path(self.job(job)["StdOut"]).read_text()

    def signal(self, job: str, name: str) -> None:
        """What SLURM sends when the time limit comes near: to the batch script alone."""
        assert self.run("scancel", f"--signal={name}", "--batch", job).returncode == 0

    def preempt(self) -> None:
        """Run a job that is more important and wants the whole node."""
        self.wait_for(self.submit("--partition=urgent", "--cpus-per-task=64", "--wrap=true"))

    def _end_of(self, job: str) -> str | None:
        state = self.job(job).get("JobState", "")
        return state if state in FINISHED else None

    def _ask(self, *command: str) -> str:
        return self.run(*command).stdout

    def _configure(self) -> None:
        for name in ("state", "spool", "gpus"):
            (self.folder / name).mkdir()
        for gpu in range(8):
            (self.folder / "gpus" / f"nvidia{gpu}").symlink_to("/dev/null")  # a GPU must be a device, and this is one
        ports = dict(zip(("controller_port", "node_port"), free_ports(2), strict=True))
        text = SLURM_CONF.format(folder=self.folder, user=getpass.getuser(), **ports)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"NodeName=localhost Name=gpu File={self.folder}/gpus/nvidia[0-7]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _munge_options(self) -> list[str]:
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]

    def _start(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("wb")
        with output:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))


def wait_until(condition: Callable[[], T | None], what: str, timeout_s: float = 240) -> T:
    """The condition's first true value; fails naming what was waited for."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
