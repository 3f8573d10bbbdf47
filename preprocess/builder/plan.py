"""The plan of a build: the worklist, one task per shard, and the hashes that identify finished shards and sets."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from preprocess.annotations.worklist import DialogueRange, Worklist, make_worklist
from preprocess.atomic import canonical_json, published
from preprocess.builder.request import BuildRequest
from preprocess.builder.sample_encoder import SampleSettings
from preprocess.builder.task import ShardTask
from preprocess.progress import LOG_EVERY_S

BUILDER = 5  # raise it when the bytes of shards change for the same input, so that every shard is rebuilt


def write_worklist(request: BuildRequest) -> Worklist:
    """Write the dialogues into the work folder, and the rows that are rejected before any image is read."""
    folder = request.folder
    with published(folder.dialogues) as dialogues, published(folder.early_rejects) as rejects:
        return make_worklist(
            request.mix,
            request.root,
            samples_per_shard=request.samples_per_shard,
            write=dialogues.write,
            on_rows=row_logger(),
            write_reject=rejects.write,
        )


def plan_tasks(request: BuildRequest, work: Worklist) -> list[ShardTask]:
    """Return one task per shard, finished or not. The same input and settings give the same tasks."""
    settings = request.settings
    return [
        ShardTask(
            name=f"shard-{number:05d}",
            spec_sha256=_task_sha256(BUILDER, settings, part),
            range=part,
            settings=settings,
            folder=request.folder,
            root=request.root,
            archives=request.mix.archives,
        )
        for number, part in enumerate(work.ranges)
    ]


def earlier_specs(task: ShardTask) -> list[str]:
    """Return the `spec_sha256` that earlier versions of the builder gave to the same task."""
    return [_task_sha256(builder, task.settings, task.range) for builder in range(1, BUILDER)]


def _task_sha256(builder: int, settings: SampleSettings, part: DialogueRange) -> str:
    return _sha256([builder, asdict(settings), part.first, part.sha256])


def set_spec_sha256(
    request: BuildRequest, work: Worklist, tasks: Sequence[ShardTask], early_rejects_sha256: str
) -> str:
    """Hash everything that a set depends on, except for the bytes of the images."""
    shards = [task.spec_sha256 for task in tasks]
    return _sha256([request.config.name, request.tokenizer.name, work.rows, early_rejects_sha256, shards])


def row_logger() -> Callable[[int], None]:
    """Return a function that prints the number of rows read, at most once every `LOG_EVERY_S` seconds."""
    last = time.monotonic()

    def log(rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            print(f"{rows} rows read", flush=True)

    return log


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
