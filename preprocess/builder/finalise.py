"""The end of a build: sidecars become the index, rejects.jsonl and, last of all, the manifest."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from preprocess.atomic import publish, published
from preprocess.builder.task import Settings, ShardTask
from preprocess.prompts import Tokenizer
from preprocess.rejects import Reject, RejectCounts, count_by_reason, count_by_source, read_rejects
from preprocess.shards.manifest import INDEX, INDEX_SCHEMA, MANIFEST, REJECTS, Manifest, ShardEntry


@dataclass(frozen=True)
class Facts:
    """What the manifest tells besides what the sidecars do. `rejects` is a file of those that the worklist made."""

    model: str
    settings: Settings
    tokenizer: Tokenizer
    rows: Counter[str]
    rejects: Path
    spec_sha256: str


@dataclass
class Contents:
    """The sum of the sidecars. `samples` are counted by source; `pictures` are digests of distinct ones."""

    shards: list[ShardEntry] = field(default_factory=list)
    sidecars: dict[str, str] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    pictures: set[str] = field(default_factory=set)
    made_with: Counter[str] = field(default_factory=Counter)
    with_image: int = 0
    text_tokens: int = 0
    supervised_tokens: int = 0
    index_sha256: str = ""

    def add(self, columns: dict[str, list[Any]]) -> None:
        self.samples.update(columns["source"])
        self.pictures.update(digest for digest in columns["picture_digest"] if digest is not None)
        self.with_image += sum(columns["has_image"])
        self.text_tokens += sum(columns["num_text_tokens"])
        self.supervised_tokens += sum(columns["num_supervised_tokens"])


@dataclass
class Losses:
    rejects: RejectCounts = field(default_factory=Counter)
    sha256: str = ""


def finalise(
    out: Path, tasks: Sequence[ShardTask], facts: Facts, may_publish: Callable[[RejectCounts], None]
) -> Manifest:
    """Publishes index, rejects and manifest. `may_publish` sees how many were rejected, and may raise."""
    contents = _publish_index(out, tasks)
    lost = _publish_rejects(out, tasks, facts)
    may_publish(lost.rejects)
    publish(out / MANIFEST, _manifest(facts, contents, lost).to_bytes())
    return Manifest.load(out)


def _publish_index(out: Path, tasks: Sequence[ShardTask]) -> Contents:
    contents = Contents()
    with (
        published(out / INDEX) as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), INDEX_SCHEMA, compression="zstd") as index,
    ):
        for task in tasks:
            data = task.sidecar.read_bytes()
            sidecar = json.loads(data)
            if sidecar["spec_sha256"] != task.spec_sha256:
                raise UserError(f"{task.sidecar} was changed by another build; run this one again, alone")
            contents.sidecars[task.sidecar.name] = hashlib.sha256(data).hexdigest()
            contents.made_with[sidecar["made_with"]] += 1
            if sidecar["samples"]:
                index.write_table(_index_table(len(contents.shards), sidecar["columns"]))
                contents.add(sidecar["columns"])
                entry = ShardEntry(task.tar.name, sidecar["sha256"], sidecar["bytes"], sidecar["samples"])
                contents.shards.append(entry)
    contents.index_sha256 = file.sha256
    return contents


def _index_table(shard: int, columns: dict[str, list[Any]]) -> pa.Table:
    columns = {"shard": [shard] * len(columns["key"]), **columns}
    return pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def _publish_rejects(out: Path, tasks: Sequence[ShardTask], facts: Facts) -> Losses:
    """Writes all rejects in the order of sources and rows."""
    lost = Losses()
    order = {name: position for position, name in enumerate(facts.rows)}
    streams = read_rejects(facts.rejects), _shard_rejects(tasks)
    ordered = heapq.merge(*streams, key=lambda reject: (order[reject.source], reject.row))
    with published(out / REJECTS) as file:
        for reject in ordered:
            lost.rejects[reject.source, reject.reason] += 1
            file.write(reject.to_line())
    lost.sha256 = file.sha256
    return lost


def _shard_rejects(tasks: Iterable[ShardTask]) -> Iterator[Reject]:
    for task in tasks:
        yield from (Reject(**entry) for entry in json.loads(task.sidecar.read_bytes())["rejects"])


def _manifest(facts: Facts, contents: Contents, lost: Losses) -> Manifest:
    settings, tokenizer, rejects = facts.settings, facts.tokenizer, count_by_source(lost.rejects)
    return Manifest(
        model=facts.model,
        template=settings.template,
        tokenizer={name: getattr(tokenizer, name) for name in ("name", "sha256", "vocab_size", "eos_id")},
        image={"px": settings.image_px, "encoding": settings.encoding},
        max_text_tokens=settings.max_text_tokens,
        spec_sha256=facts.spec_sha256,
        made_with=dict(contents.made_with),
        counts=_counts(facts.rows, contents, lost),
        sources={
            name: {"rows": rows, "samples": contents.samples[name], "rejects": rejects[name]}
            for name, rows in facts.rows.items()
        },
        rejects_by_reason=dict(count_by_reason(lost.rejects)),
        shards=tuple(contents.shards),
        sidecars=contents.sidecars,
        index={"sha256": contents.index_sha256, "rows": contents.samples.total()},
        rejects={"sha256": lost.sha256, "rows": lost.rejects.total()},
    )


def _counts(rows: Counter[str], contents: Contents, lost: Losses) -> dict[str, int]:
    samples = contents.samples.total()
    counts = {
        "rows": rows.total(),
        "samples": samples,
        "rejects": lost.rejects.total(),
        "with_image": contents.with_image,
        "text_only": samples - contents.with_image,
        "pictures": len(contents.pictures),
        "text_tokens": contents.text_tokens,
        "supervised_tokens": contents.supervised_tokens,
    }
    assert counts["rows"] == samples + counts["rejects"], f"rows were lost or counted twice: {counts}"
    return counts
