"""DataLoader workers of one rank: starting them, waiting for them, and explaining how one died."""

from __future__ import annotations

import multiprocessing.queues
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from typing import Any, NoReturn

from torch.utils.data import DataLoader, Dataset

from pipeline.data.batch import MicroBatch
from pipeline.distributed.processes import PROBLEM_STATES, process_state
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CRASHED, RetryableError
from pipeline.recipe import Recipe
from preprocess.socket_folder import socket_folder

PREFETCH = 4  # micro-batches that each worker keeps ready
EXIT_GRACE_S = 5.0  # time for a worker to exit after its connection broke, so that the error can name the worker
WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]+)")  # torch's RuntimeError
SOCKET = "pymp-12345678/listener-12345678"  # name that multiprocessing gives to a socket, relative to TMPDIR
PIN_THREAD_DIED = "Pin memory thread exited unexpectedly"


class Workers:
    """Load `dataset[items]` in order, in `data.workers` processes that prefetch.

    The constructor starts the processes. With `data.workers=0`, this process loads each item when it is needed.
    """

    def __init__(self, dataset: Dataset, items: range, recipe: Recipe, ranks: Ranks):
        self.ranks = ranks
        num_workers = recipe.data.workers
        if num_workers:
            prepare_sockets()
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            pin_memory=ranks.device.type == "cuda",
            # A fork of a process with threads (Gloo's, NCCL's) can hang, and a fork server would outlive a kill.
            multiprocessing_context="spawn" if num_workers else None,
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=_prepare_worker,
        )
        # Workers and Python's resource tracker inherit the mask, so that a SIGUSR1 to the job does not end them. Only
        # the rank handles this signal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            self.batches: Any = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def processes(self) -> list[Any]:
        return list(getattr(self.batches, "_workers", ()))

    def describe_wait(self) -> str:
        """Describe what the rank waits for: the process ids of its workers, and the state of those that are stuck."""
        described = []
        for process in self.processes:
            state = PROBLEM_STATES.get(process_state(process.pid))
            described.append(f"{process.pid} ({state})" if state else str(process.pid))
        source = f" from DataLoader worker {', '.join(described)}" if described else ""
        return f"rank {self.ranks.rank} on {socket.gethostname()}: waiting for data{source}"

    def close(self) -> None:
        """End the processes, even if the traceback of an error keeps this object alive.

        Otherwise Python would wait for the workers forever at exit, because they ignore Python's SIGTERM.
        """
        self.batches = None

    def next(self) -> MicroBatch:
        """Return the next micro-batch.

        Raises:
            DamagedShardError: A sample cannot be read.
            RetryableError: The file system failed, or a worker died while it was sending its tensors.
        """
        try:
            item = next(self.batches)
        except (OSError, EOFError) as error:
            pids = {process.sentinel: process.pid for process in self.processes}
            exited = ", ".join(str(pids[sentinel]) for sentinel in wait(list(pids), timeout=EXIT_GRACE_S))
            raise _worker_died_error(self.ranks, exited, f"ended ({error})") from error
        if isinstance(item, Exception):  # returned rather than raised: see MicroBatchDataset
            raise item
        return item


def prepare_sockets() -> None:
    """Choose the folder in which DataLoader workers create the sockets that transfer their tensors.

    If such a socket could not be created, for example because the path of TMPDIR is too long, the worker would only
    print an error, and the rank would wait for its first micro-batch forever.

    Raises: UserError if no folder can hold a socket.
    """
    previous = tempfile.tempdir
    tempfile.tempdir = socket_folder(os.environ.get("TMPDIR") or "/tmp", SOCKET)
    try:
        multiprocessing.util.get_temp_dir()  # creates a folder in `tempfile.tempdir`; workers inherit its path
    finally:
        tempfile.tempdir = previous


def worker_death(error: RuntimeError, ranks: Ranks) -> RetryableError | None:
    """Return the error to report if `error` means that a worker died, otherwise None.

    torch's SIGCHLD handler can raise this error at any point of the training.
    """
    if PIN_THREAD_DIED in str(error):  # torch's pinning thread noticed the death first
        return RetryableError(
            f"rank {ranks.rank} on {socket.gethostname()}: a DataLoader worker or its pinning thread ended"
        )
    matches = WORKER_DIED.match(str(error))
    return _worker_died_error(ranks, *matches.groups()) if matches else None


def _worker_died_error(ranks: Ranks, pid: str, how: str) -> RetryableError:
    return RetryableError(
        f"rank {ranks.rank} on {socket.gethostname()}: DataLoader worker {pid} {how}; "
        "if memory ran out, lower data.workers"
    )


def prefetched_bytes(recipe: Recipe) -> int:
    """Return the bytes of shared memory that one rank's prefetched micro-batches need."""
    config = recipe.config
    sample = 3 * config.vision.image_px**2 + 2 * 8 * config.max_text_tokens
    return recipe.data.workers * PREFETCH * recipe.optim.micro_batch * sample


def _prepare_worker(worker: int) -> None:
    """Prepare a worker process.

    It ignores SLURM's preemption signal, because the rank still needs its workers until it has saved and stopped. It
    ends if it cannot send a micro-batch. By default it would only print the error, and the rank would wait forever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A private hook of multiprocessing. If a later version lacks the hook, the watchdog still ends the wait.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, item: object) -> NoReturn:
    print(f"error: DataLoader worker {os.getpid()}: cannot send a micro-batch: {error!r}", file=sys.stderr, flush=True)
    os._exit(CRASHED)
