"""The tasks of a build on Ray: on the cluster that we are in, or on one of our own."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence

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

from model.errors import UserError, first_line
from preprocess.builder.sigterm import sigterm_kept
from preprocess.builder.task import ShardTask, build_shard, read_last_seen
from preprocess.progress import Progress

RETRIES = 3  # of a shard whose process died, or could not read or write
_DEATHS = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError)


def build_on_ray(tasks: Sequence[ShardTask], workers: int | None, progress: Progress) -> None:
    """At most two tasks per CPU are in flight. What failed to read or write, and what died, is tried again."""
    with _cluster(workers):
        remote = ray.remote(build_shard).options(max_retries=0)  # it would not count who is killed for memory
        gauges = {name: Gauge(f"emma_{name}", f"build_shards: {name}") for name in progress.numbers()}
        waiting = list(reversed(tasks))
        flying: dict[ray.ObjectRef, ShardTask] = {}
        failures = Counter[str]()
        progress.tick()
        while waiting or flying:
            most = workers or _most_in_flight()
            while waiting and len(flying) < most:
                task = waiting.pop()
                flying[remote.remote(task)] = task
            for landed in ray.wait(list(flying), timeout=1.0)[0]:
                task = flying.pop(landed)
                try:
                    finished = ray.get(landed)
                except (*_DEATHS, OSError) as error:
                    failures[task.name] += 1
                    if failures[task.name] > RETRIES:
                        raise _explained(error, task) from None
                    last = isinstance(error, OutOfMemoryError)  # by then others may need less
                    waiting.insert(0 if last else len(waiting), task)
                else:
                    progress.add(finished.dialogues, finished.rejects)
            progress.tick()
            for name, value in progress.numbers().items():
                gauges[name].set(value)
        progress.tick("finalising", last=True)


def _most_in_flight() -> int:
    """Asked again and again, for machines come while a build runs."""
    return max(1, 2 * int(ray.cluster_resources().get("CPU", 0)))


def _explained(error: Exception, task: ShardTask) -> Exception:
    if isinstance(error, OSError):
        return error
    advice = "if a picture is to blame, remove it"
    if isinstance(error, OutOfMemoryError):
        advice = "the machine's memory is full: give fewer --workers"
    return UserError(
        f"{task.name}: its process died {RETRIES + 1} times, the last time at {read_last_seen(task)} "
        f"({first_line(error)}); {advice}; what is finished is kept"
    )


@contextlib.contextmanager
def _cluster(workers: int | None) -> Iterator[None]:
    """The cluster that we are in, or one of our own that ends with us."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS {address} is a job server: use `ray job submit`, or unset it to run on this machine"
        )
    try:
        with sigterm_kept():  # Ray's own handlers dump its stack, or exit with 1
            if address:
                ray.init(logging_level="warning")
            else:
                ray.init(address="local", num_cpus=workers, include_dashboard=False, logging_level="warning")
        yield
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS {address}: {error}") from None
    except RayTaskError:
        raise
    except RayError as error:
        raise UserError(
            f"Ray gave up ({first_line(error)}); what is finished is kept: run the same command again"
        ) from None
    finally:
        ray.shutdown()
