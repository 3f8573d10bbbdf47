"""Ends a run that hangs, or that lost a rank, with the Python stacks of every rank in the run folder.

Each rank has a thread that watches its own step, and the other ranks' processes on its machine. A collective that one
rank never enters holds up all of them, so all write their stacks at about the same time; what one rank sees, the
others read off the folder that it made. The main rank's also gives the signs of life that `pipeline.status` goes by.
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
from typing import NoReturn

import torch.distributed as dist

from model.errors import UserError
from pipeline.distributed.processes import PROBLEM_STATES, process_state
from pipeline.distributed.ranks import Ranks
from pipeline.metrics.logger import append_event
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder

EXIT_LOST = 4  # try again: neither the recipe nor the data is to blame
FIRST_STEPS = 8  # whose compilation and warming up may take long
REMEMBERED = 50  # steps, for their median time
POLL_S = 1.0
GRACE_S = 5.0  # from a rank's stacks to its end, so that the others can write theirs
STUCK_S = 60.0  # after which a rank that could not end itself writes its stacks to the log, and then ends all the same
SUSPENDED_S = 5.0  # a thread that was held up for longer was so with the whole job, as by `scontrol suspend`


def bound_collectives(recipe: Recipe) -> None:
    """Let collectives fail by themselves, but after the watchdog had its chance. Call it before the ranks meet."""
    minutes = math.ceil(2 * recipe.watchdog.first_s / 60)
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(minutes))  # of the process group
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # a failed collective ends its process


class Watchdog:
    """Context manager; every rank must enter it.

    `step_done` sets the time for the next step; `during` gives something else than a step the time that it may take.
    """

    def __init__(self, run: RunFolder, ranks: Ranks):
        self.run, self.ranks, self.options = run, ranks, run.recipe.watchdog
        self.step, self.seconds = 0, deque[float](maxlen=REMEMBERED)
        self.lived = 0.0  # seconds, without those for which the job was suspended
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        everyone: list[tuple[str, int, float]] = [("", 0, 0.0)] * self.ranks.world_size
        dist.all_gather_object(everyone, (_where(), os.getpid(), time.time()))
        began = time.strftime("%Y%m%d-%H%M%S", time.gmtime(everyone[0][2]))
        self.folder = self.run.folder / "stacks" / began
        here = [(rank, pid) for rank, (host, pid, _) in enumerate(everyone) if host == _where()]
        self.peers = {rank: pid for rank, pid in here if rank != self.ranks.rank and process_state(pid)}
        self._expect("the start", self.options.first_s)
        faulthandler.enable()  # and a crash in compiled code tells where it was
        threading.Thread(target=self._keep_time, name="watchdog's clock", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """An error may be another rank's death: that rank is looked for, and named."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            until = time.monotonic() + 2 * POLL_S
            while time.monotonic() < until:
                if lost := self._lost_rank():
                    self._end(lost)
                time.sleep(POLL_S / 10)

    def step_done(self, step: int) -> None:
        """`step` steps are done, and the next one begins."""
        now = time.monotonic()
        self.seconds.append(now - self.since)
        self.step = step
        self._expect(f"step {step + 1}", self.allowance())

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """A save or an evaluation, which may take longer than a step."""
        self._expect(what, self.options.first_s)
        yield
        self._expect(f"step {self.step + 1}", self.allowance())

    @contextmanager
    def before_the_end(self) -> Iterator[None]:
        """Around the steps: what comes after them, as wandb's last words, may take longer too."""
        try:
            yield
        finally:
            self._expect("the end", self.options.first_s)

    def allowance(self) -> float:
        """Seconds that the next step may take."""
        if len(self.seconds) < FIRST_STEPS:
            return self.options.first_s
        return max(self.options.slow_factor * median(self.seconds), self.options.least_s)

    def _expect(self, what: str, allowance: float) -> None:
        self.since = time.monotonic()
        if self.options.slow_factor:
            self.due = (what, allowance, self.lived + allowance)
            faulthandler.dump_traceback_later(allowance + STUCK_S)
        else:
            self.due = (what, allowance, math.inf)

    def _keep_time(self) -> None:
        """Count the seconds, and end this rank if `_watch` cannot: the run folder's file system may never answer it.

        So this thread touches no file. faulthandler, which writes the stacks before, would not know of a suspension.
        """
        asked = time.monotonic()
        while not self.ended.wait(POLL_S):
            now = time.monotonic()
            self.lived += min(now - asked, SUSPENDED_S)
            asked = now
            if self.lived > self.due[2] + 2 * STUCK_S:
                os._exit(EXIT_LOST)

    def _watch(self) -> None:
        while not self.ended.wait(POLL_S):
            what, allowance, until = self.due
            if lost := self._lost_rank():
                self._end(lost)
            if self.lived > until:
                self._end(f"{what} takes longer than {allowance:.0f} s{self._usual()}{self._telling()}")
            if self._others_end():
                self._end("another rank ends the run")
            with contextlib.suppress(OSError):
                self.run.beat()

    def _others_end(self) -> bool:
        """A file system that fails tells nothing of them."""
        with contextlib.suppress(OSError):
            return self.folder.exists()
        return False

    def _usual(self) -> str:
        return f" (usually {median(self.seconds):.1f})" if self.seconds else ""

    def _telling(self) -> str:
        """Of ranks on this machine, what their process state gives away."""
        states = {rank: PROBLEM_STATES.get(process_state(pid)) for rank, pid in self.peers.items()}
        return "".join(f"; rank {rank} is {state}" for rank, state in states.items() if state)

    def _lost_rank(self) -> str | None:
        gone = [rank for rank, pid in self.peers.items() if process_state(pid) in ("", "Z")]
        return f"rank {gone[0]} has ended" if gone else None

    def _end(self, reason: str) -> NoReturn:
        """Write the stacks; the first to come also tells why; wait for the others, and leave."""
        try:
            self._write_stacks(reason)
            code = self._tell(reason)
        except OSError as error:
            print(f"error: {reason}; the run folder does not take the stacks ({error})", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            code = EXIT_LOST
        time.sleep(GRACE_S)
        os._exit(code)

    def _write_stacks(self, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.ranks.rank}.txt").open("w") as file:
            print(f"rank {self.ranks.rank}, {socket.gethostname()}, after step {self.step}: {reason}\n", file=file)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _tell(self, reason: str) -> int:
        """Once for all ranks. The exit code: not to be tried again if a rank has told of a mistake before it ended."""
        try:
            with (self.folder / "reason.txt").open("x") as file:
                file.write(f"{reason}\n")
        except FileExistsError:
            return EXIT_LOST
        if self.run.begun_at is not None and (self.run.folder / "outcome.json").exists():
            return 1
        print(f"error: {reason}; Python stacks of the ranks are in {self.folder}", file=sys.stderr, flush=True)
        self.run.end("lost", self.step, reason)
        append_event(self.run.folder, "lost", self.step, reason=reason, stacks=str(self.folder))
        return EXIT_LOST


def _where() -> str:
    """The machine, and the container on it: where a process's number means the same process."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
