"""The number of Ray tasks in flight on a fake cluster that grows and shrinks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preprocess.builder import on_ray
from preprocess.builder.task import ShardResult
from preprocess.progress import Progress
from preprocess.shards.folder import ShardFolder


class Cluster:
    """A fake of the ray module. Each call of cluster_resources returns the next of `cpus`; each wait ends one task."""

    def __init__(self, cpus: list[int]) -> None:
        self.cpus, self.in_flight = cpus, list[int]()

    def init(self, **options: Any) -> None: ...

    def shutdown(self) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        cpus = self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0]
        return {"CPU": float(cpus)} if cpus else {}  # Ray omits resources whose amount is zero

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda task: object()))

    def wait(self, running: list[object], timeout: float) -> tuple[list[object], list[object]]:
        self.in_flight.append(len(running))
        return running[:1], running[1:]

    def get(self, ref: object) -> ShardResult:
        return ShardResult(name="shard", dialogues=1, samples=1, rejects={})


@pytest.mark.parametrize(
    ("cpus", "workers", "in_flight"),
    [
        ([2, 2, 4], None, [4, 4, 8, 8, 8]),  # nodes that join get tasks
        ([4, 1], None, [8, 7, 6, 5, 4]),  # after a node has left, fewer tasks are in flight
        ([0, 0, 1], None, [1, 1, 2, 2, 2]),  # a head node without CPUs, and nodes that join later
        ([8], 3, [3, 3, 3, 3, 3]),
    ],
)
def test_the_number_of_tasks_in_flight_follows_the_number_of_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpus: list[int], workers: int | None, in_flight: list[int]
) -> None:
    cluster = Cluster(cpus)
    monkeypatch.setenv("RAY_ADDRESS", "there:1")
    monkeypatch.setattr(on_ray, "ray", cluster)
    monkeypatch.setattr(on_ray, "Gauge", lambda name, what: SimpleNamespace(set=lambda value: None))
    tasks: Any = [SimpleNamespace(name=f"shard-{number:05d}") for number in range(20)]
    progress = Progress(ShardFolder(tmp_path), total=20)
    on_ray.build_on_ray(tasks, workers, progress)
    assert cluster.in_flight[:5] == in_flight
    assert progress.done == 20
