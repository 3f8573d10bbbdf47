"""`build_on_ray`: runs the tasks of a build on a Ray cluster, or on a local Ray instance that it starts."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.metrics import Gauge

from model.errors import CommandError, UserError, first_line
from preprocess.builder.sigterm import restore_sigterm_handler
from preprocess.builder.task import ShardTask, build_shard, read_last_seen
from preprocess.progress import Progress
from preprocess.socket_folder import socket_folder

RETRIES = 3  # per shard; a task is retried if its process dies or it raises OSError
# Longest path of a socket in Ray's folder. The numbers stand for the time and the process id.
_RAY_SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_WORKER_DEATHS = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError)


def build_on_ray(tasks: Sequence[ShardTask], workers: int | None, progress: Progress) -> None:
    """Build the shards of all tasks, with at most `workers` tasks submitted at a time, or two per CPU if it is None.

    A task is retried up to `RETRIES` times if its process dies or it raises OSError.

    Raises: UserError or OSError if a task still fails, or if Ray fails.
    """
    with _cluster(workers):
        # Tasks are retried here instead of by Ray, whose limit ignores tasks that were killed for memory.
        remote = ray.remote(build_shard).options(max_retries=0)
        gauges = {name: Gauge(f"emma_{name}", f"build_shards: {name}") for name in progress.metrics()}
        waiting = list(reversed(tasks))
        running: dict[ray.ObjectRef, ShardTask] = {}
        failures = Counter[str]()
        progress.tick()
        while waiting or running:
            limit = workers or _max_in_flight()
            while waiting and len(running) < limit:
                task = waiting.pop()
                running[remote.remote(task)] = task
            for finished_ref in ray.wait(list(running), timeout=1.0)[0]:
                task = running.pop(finished_ref)
                try:
                    result = ray.get(finished_ref)
                except (*_WORKER_DEATHS, OSError) as error:
                    failures[task.name] += 1
                    if failures[task.name] > RETRIES:
                        raise _final_error(error, task) from None
                    if isinstance(error, OutOfMemoryError):
                        waiting.insert(0, task)  # retried last, when fewer tasks share the memory
                    else:
                        waiting.append(task)
                else:
                    progress.add(result.dialogues, result.rejects)
            progress.tick()
            for name, value in progress.metrics().items():
                gauges[name].set(value)
        progress.tick("finalising", last=True)


def _max_in_flight() -> int:
    """Return twice the current number of CPUs, which changes when nodes join or leave the cluster during a build."""
    return max(1, 2 * int(ray.cluster_resources().get("CPU", 0)))


def _final_error(error: Exception, task: ShardTask) -> Exception:
    """Return the error to raise for a task that has failed after all its retries."""
    if isinstance(error, OSError):
        return error.cause if isinstance(error, RayTaskError) else error
    advice = "if an image of that row causes it, remove the image"
    if isinstance(error, OutOfMemoryError):
        advice = "the machine ran out of memory: give fewer --workers"
    return UserError(
        f"{task.name}: its process died {RETRIES + 1} times, the last time at {read_last_seen(task)} "
        f"({first_line(error)}); {advice}. Finished shards are kept"
    )


@contextlib.contextmanager
def _cluster(workers: int | None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or start a local one for the duration of the block."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS {address} is a job server: use `ray job submit`, or unset it to run on this machine"
        )
    try:
        with contextlib.ExitStack() as stack:
            options = {} if address else stack.enter_context(_local_options(workers))
            stack.callback(ray.shutdown)
            with restore_sigterm_handler():  # because Ray installs handlers that dump a stack or exit with 1
                ray.init(logging_level="warning", **options)
            yield
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({error}); correct it, or unset it to run on this machine"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, CommandError):
            raise error.cause from None  # without Ray's traceback, which helps only with crashes
        raise
    except RayError as error:
        raise UserError(
            f"Ray failed ({first_line(error)}); finished shards are kept: run the same command again"
        ) from None


@contextlib.contextmanager
def _local_options(workers: int | None) -> Iterator[dict[str, Any]]:
    """Return the options of `ray.init` that start Ray on this machine. It writes nothing into the home folder."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray keeps one in the home folder
    options: dict[str, Any] = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if (folder := socket_folder(usual, _RAY_SOCKET)) == usual:
        yield options
    else:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
            yield {**options, "_temp_dir": f"{own}/ray"}
