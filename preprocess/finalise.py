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
from preprocess.prompts import Tokenizer
from preprocess.rejects import Reject
from preprocess.shards import (
    INDEX,
    INDEX_SCHEMA,
    MANIFEST,
    REJECTS,
    Manifest,
    ShardEntry,
    publish,
    published,
)
from preprocess.task import Settings, ShardTask


@dataclass
class Totals:
    """What the manifest counts, summed over sidecars."""

    samples: Counter[str] = field(default_factory=Counter)  # by source
    with_image: int = 0
    text_tokens: int = 0
    supervised_tokens: int = 0
    pictures: set[str] = field(default_factory=set)

    def add(self, columns: dict[str, list[Any]]) -> None:
        self.samples.update(columns["source"])
        self.with_image += sum(columns["has_image"])
        self.text_tokens += sum(columns["num_text_tokens"])
        self.supervised_tokens += sum(columns["num_supervised_tokens"])
        self.pictures.update(digest for digest in columns["picture_sha256"] if digest is not None)


@dataclass(frozen=True)
class Finished:
    """What `finalise` was given besides the tasks."""

    model: str
    settings: Settings
    tokenizer: Tokenizer
    rows: Counter[str]
    rejects: Sequence[Reject]
    spec_sha256: str


def finalise(
    out: Path, tasks: Sequence[ShardTask], about: Finished, may_publish: Callable[[Counter[str]], None]
) -> Manifest:
    """Publishes index, rejects and manifest. `may_publish` sees the rejects by source, and may raise."""
    totals = Totals()
    entries: list[ShardEntry] = []
    sidecars: dict[str, str] = {}
    with (
        published(out / INDEX) as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), INDEX_SCHEMA, compression="zstd") as index,
    ):
        for task in tasks:
            data = task.sidecar.read_bytes()
            sidecar = json.loads(data)
            if sidecar["spec_sha256"] != task.spec_sha256:
                raise UserError(f"{task.sidecar} was changed by another build; run this one again, alone")
            sidecars[task.sidecar.name] = hashlib.sha256(data).hexdigest()
            if not sidecar["samples"]:
                continue
            index.write_table(_index_table(len(entries), sidecar["columns"]))
            totals.add(sidecar["columns"])
            entries.append(ShardEntry(task.tar.name, sidecar["sha256"], sidecar["bytes"], sidecar["samples"]))
    by_source, by_reason, rejects_sha256 = _publish_rejects(out, tasks, about)
    may_publish(by_source)
    manifest = Manifest(
        model=about.model,
        template=about.settings.template,
        tokenizer={
            "name": about.tokenizer.name,
            "sha256": about.tokenizer.sha256,
            "vocab_size": about.tokenizer.vocab_size,
            "eos_id": about.tokenizer.eos_id,
        },
        image={"px": about.settings.image_px, "encoding": about.settings.encoding},
        max_text_tokens=about.settings.max_text_tokens,
        spec_sha256=about.spec_sha256,
        counts=_counts(about.rows, totals, by_source),
        sources={
            name: {"rows": rows, "samples": totals.samples[name], "rejects": by_source[name]}
            for name, rows in about.rows.items()
        },
        rejects_by_reason=dict(by_reason),
        shards=tuple(entries),
        sidecars=sidecars,
        index={"sha256": file.sha256, "rows": totals.samples.total()},
        rejects={"sha256": rejects_sha256, "rows": by_source.total()},
    )
    publish(out / MANIFEST, manifest.to_bytes())
    return Manifest.load(out)


def _index_table(shard: int, columns: dict[str, list[Any]]) -> pa.Table:
    columns = {"shard": [shard] * len(columns["key"]), **columns}
    return pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def _publish_rejects(out: Path, tasks: Sequence[ShardTask], about: Finished) -> tuple[Counter[str], Counter[str], str]:
    """All rejects in the order of sources and rows; returns how many by source and by reason, and the file's sha256."""
    by_source, by_reason = Counter[str](), Counter[str]()
    order = {name: position for position, name in enumerate(about.rows)}
    with published(out / REJECTS) as file:
        for reject in heapq.merge(
            about.rejects,
            _shard_rejects(tasks),
            key=lambda reject: (order[reject.source], reject.row),
        ):
            by_source[reject.source] += 1
            by_reason[reject.reason] += 1
            file.write(json.dumps(reject.to_json()).encode() + b"\n")
    return by_source, by_reason, file.sha256


def _shard_rejects(tasks: Iterable[ShardTask]) -> Iterator[Reject]:
    for task in tasks:
        yield from (Reject(**entry) for entry in json.loads(task.sidecar.read_bytes())["rejects"])


def _counts(rows: Counter[str], totals: Totals, rejects: Counter[str]) -> dict[str, int]:
    counts = {
        "rows": rows.total(),
        "samples": totals.samples.total(),
        "rejects": rejects.total(),
        "with_image": totals.with_image,
        "text_only": totals.samples.total() - totals.with_image,
        "pictures": len(totals.pictures),
        "text_tokens": totals.text_tokens,
        "supervised_tokens": totals.supervised_tokens,
    }
    assert counts["rows"] == counts["samples"] + counts["rejects"], f"rows were lost or counted twice: {counts}"
    return counts
