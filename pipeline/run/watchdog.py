"""The watchdog, which ends a run when a rank dies or hangs, so that the job is requeued.

What happens when a rank dies:

1. The other ranks wait for the dead rank in a collective. The watchdog, a thread in each rank, notices the death. On
   the same machine, it sees within a second that the process has ended. On other machines, it sees that the folder of
   step 2 exists.
   If a whole machine is lost, or if a rank hangs, the current step exceeds its time limit: `watchdog.slow_factor` times
   the median step, but at least `watchdog.least_s`. The first steps, saves and validations may take `watchdog.first_s`.
2. Each rank writes its Python stacks to `RUN/stacks/TIME/rank-N.txt`. The first rank that does so also writes the
   reason to stderr and to `metrics.jsonl`, and the outcome "lost" to `outcome.json`.
3. Each rank exits with code 4 (retry). torchrun or srun kills the remaining ranks.
4. `slurm/train_emma.sh` requeues the job, up to its limits. The next launch resumes from the newest checkpoint
   that verifies (`pipeline.checkpoint.resumer`), and repeats the steps after it.

A rank that receives SIGTERM before the first step of its launch exits at once, because there is nothing to save. A rank
that raises an error itself exits through `pipeline.run.failure`. Before the watchdog exists,
`time_limit` ends a launch that hangs. The main rank's watchdog also updates the heartbeat that `pipeline.status` reads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from model.errors import ExitCode, UserError
from pipeline.distributed.processes import PROBLEM_STATES, process_state
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CRASHED
from pipeline.metrics.logger import append_event
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder

FIRST_STEPS = 8  # number of initial steps, which are slow because of compilation and warm-up
REMEMBERED_STEPS = 50  # the usual step time is the median over this many most recent steps
POLL_S = 1.0
GRACE_S = 5.0  # delay of a rank's exit, so that the other ranks can write their stacks first
# Seconds after the time limit at which a rank that could not end itself dumps its stacks to stderr. It exits after
# twice this time.
STUCK_S = 60.0
SUSPENDED_S = 5.0  # a longer gap between two polls means that the job was suspended, for example by `scontrol suspend`


def set_collective_timeouts(recipe: Recipe) -> None:
    """Set the timeout of collectives to twice the watchdog's longest limit. Call it before the process group exists."""
    minutes = math.ceil(2 * recipe.watchdog.first_s / 60)
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(minutes))  # timeout of the process group
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # end the process if a collective fails


@contextmanager
def time_limit(limit_s: float, operation: str, ranks: Ranks) -> Iterator[None]:
    """End this process with the exit code for a retry if the block takes too long, such as when a rank is missing."""

    def end_process() -> None:
        where = f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}"
        print(
            f"error: {where}: {operation} takes longer than {limit_s:g} s. "
            "Look for a rank that did not start, and check the network between the nodes.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.RETRY)

    timer = threading.Timer(limit_s, end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Deadline(NamedTuple):
    operation: str
    limit_s: float
    at: float  # value of `Watchdog.active_s` at which the operation must have ended


class Watchdog:
    """Context manager that ends this process if its current operation exceeds a time limit, or if another rank dies.

    Every rank must enter it. `step_done` sets the limit for the next step, and `allow_time_for` for other operations.
    """

    def __init__(self, run: RunFolder, ranks: Ranks):
        self.run, self.ranks, self.config = run, ranks, run.recipe.watchdog
        self.step, self.step_times = 0, deque[float](maxlen=REMEMBERED_STEPS)
        self.active_s = 0.0  # seconds since this object was built, excluding time when the job was suspended
        self.closed = threading.Event()

    def __enter__(self) -> Watchdog:
        by_rank: list[tuple[str, int, float]] = [("", 0, 0.0)] * self.ranks.world_size
        dist.all_gather_object(by_rank, (_process_namespace(), os.getpid(), time.time()))
        # Use rank 0's time, so that the name of the folder is the same on all ranks.
        began = time.strftime("%Y%m%d-%H%M%S", time.gmtime(by_rank[0][2]))
        self.folder = self.run.folder / "stacks" / began
        here = [(rank, pid) for rank, (namespace, pid, _) in enumerate(by_rank) if namespace == _process_namespace()]
        self.peers = {rank: pid for rank, pid in here if rank != self.ranks.rank and process_state(pid)}
        self._set_deadline("start-up", self.config.first_s)
        faulthandler.enable()  # so that a crash in compiled code prints its stack
        threading.Thread(target=self._keep_time, name="watchdog clock", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching. An unexpected error may come from a rank that died, so look for one and report it instead."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            until = time.monotonic() + 2 * POLL_S
            while time.monotonic() < until:
                if reason := self._dead_rank():
                    self._end_process(reason)
                time.sleep(POLL_S / 10)

    def step_done(self, step: int) -> None:
        """Record that `step` steps are done, and set the time limit of the next one."""
        self.step_times.append(time.monotonic() - self.since)
        self.step = step
        self._set_deadline(f"step {step + 1}", self.step_limit_s())

    @contextmanager
    def allow_time_for(self, operation: str) -> Iterator[None]:
        """Allow `first_s` for a block between two steps, such as a save or a validation."""
        self._set_deadline(operation, self.config.first_s)
        yield
        self._set_deadline(f"step {self.step + 1}", self.step_limit_s())

    @contextmanager
    def allow_time_to_finish(self) -> Iterator[None]:
        """When the block ends, even with an error, allow `first_s` for what follows, such as closing wandb."""
        try:
            yield
        finally:
            self._set_deadline("shutdown", self.config.first_s)

    def step_limit_s(self) -> float:
        """Compute how long the next step may take, from the median of the last steps."""
        if len(self.step_times) < FIRST_STEPS:
            return self.config.first_s
        return max(self.config.slow_factor * median(self.step_times), self.config.least_s)

    def _set_deadline(self, operation: str, limit_s: float) -> None:
        self.since = time.monotonic()
        if self.config.slow_factor:
            self.deadline = Deadline(operation, limit_s, self.active_s + limit_s)
            faulthandler.dump_traceback_later(limit_s + STUCK_S)
        else:
            self.deadline = Deadline(operation, limit_s, math.inf)

    def _keep_time(self) -> None:
        """Count `active_s`, and end the process if `_watch` cannot because the file system does not respond.

        This thread accesses no files, so that it cannot be blocked itself.
        """
        last = time.monotonic()
        while not self.closed.wait(POLL_S):
            now = time.monotonic()
            self.active_s += min(now - last, SUSPENDED_S)
            last = now
            if self.active_s > self.deadline.at + 2 * STUCK_S:
                os._exit(ExitCode.RETRY)

    def _watch(self) -> None:
        while not self.closed.wait(POLL_S):
            operation, limit_s, at = self.deadline
            if reason := self._dead_rank():
                self._end_process(reason)
            if self.active_s > at:
                usual = f" (usually {median(self.step_times):.1f})" if self.step_times else ""
                self._end_process(f"{operation} takes longer than {limit_s:.0f} s{usual}{self._problem_ranks()}")
            if self._another_rank_ends():
                self._end_process("another rank ends the run")
            if not self.step_times and (name := self.run.control.received_signal()):
                self._end_start(name)
            with contextlib.suppress(OSError):
                self.run.heartbeat()

    def _dead_rank(self) -> str | None:
        dead = [rank for rank, pid in self.peers.items() if process_state(pid) in ("", "Z")]
        return f"rank {dead[0]} has ended" if dead else None

    def _another_rank_ends(self) -> bool:
        """Return whether another rank has created the stacks folder, which means that the run is ending."""
        with contextlib.suppress(OSError):
            return self.folder.exists()
        return False

    def _problem_ranks(self) -> str:
        """List the ranks on this machine whose process state explains a hang."""
        states = {rank: PROBLEM_STATES.get(process_state(pid)) for rank, pid in self.peers.items()}
        return "".join(f"; rank {rank} is {state}" for rank, state in states.items() if state)

    def _end_process(self, reason: str) -> NoReturn:
        """Write this rank's stacks, report the reason if no other rank has done so, and exit."""
        try:
            self._write_stacks(reason)
            code = self._report(reason)
        except OSError as error:
            print(f"error: {reason}; cannot write stacks to the run folder ({error})", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            code = ExitCode.RETRY
        time.sleep(GRACE_S)
        os._exit(code)

    def _end_start(self, signal_name: str) -> NoReturn:
        """Exit because of a signal before this launch has done a step. There is nothing to save.

        No outcome is written, so the batch script treats the end as a crash, and requeues the job if it was preempted.
        """
        if self.ranks.is_main:
            reason = f"by {signal_name} before the first step of this launch"
            print(f"stopped {reason}", flush=True)
            with contextlib.suppress(OSError):
                if self.run.first_step is None:
                    self.run.record_failed_start(f"stopped {reason}")
                else:
                    append_event(self.run.folder, "stopped", self.run.first_step, reason=reason)
        time.sleep(GRACE_S)  # until the other ranks have seen the signal too, or they would report a dead rank
        os._exit(ExitCode.TERMINATED)

    def _write_stacks(self, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.ranks.rank}.txt"
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            print(f"rank {self.ranks.rank}, {socket.gethostname()}, after step {self.step}: {reason}\n", file=file)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report(self, reason: str) -> int:
        """Report the reason, unless another rank has reported it. Return the exit code.

        The code is CRASHED if an outcome already exists, because then a rank has failed with an error of its own.
        """
        try:
            with (self.folder / "reason.txt").open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{reason}\n")
        except FileExistsError:
            return ExitCode.RETRY
        if self.run.first_step is not None and (self.run.folder / "outcome.json").exists():
            return CRASHED
        print(f"error: {reason}; Python stacks of the ranks are in {self.folder}", file=sys.stderr, flush=True)
        self.run.write_outcome("lost", step=self.step, reason=reason)
        append_event(self.run.folder, "lost", self.step, reason=reason, stacks=str(self.folder))
        return ExitCode.RETRY


def _process_namespace() -> str:
    """Return a name of this machine and container. Process ids are comparable between ranks with the same name."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
