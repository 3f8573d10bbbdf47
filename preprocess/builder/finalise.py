"""The last phase of a build: writes index.parquet, rejects.jsonl and manifest.json from the sidecars."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from preprocess.atomic import publish, published
from preprocess.builder.sample_encoder import SampleSettings
from preprocess.builder.task import ShardTask
from preprocess.prompts import Tokenizer
from preprocess.rejects import Reject, RejectCounts, count_by_reason, count_by_source, read_rejects
from preprocess.shards.folder import ShardFolder
from preprocess.shards.manifest import INDEX_SCHEMA, Manifest, ShardEntry


@dataclass(frozen=True, kw_only=True)
class ManifestInputs:
    """Values that the manifest needs in addition to the sidecars. `rows` is the number of input rows by source."""

    model: str
    settings: SampleSettings
    tokenizer: Tokenizer
    rows: Counter[str]
    spec_sha256: str


@dataclass
class SetContents:
    """Totals over all sidecars.

    Attributes:
        sidecars: sha256 of each sidecar by file name.
        samples: number of samples by source.
        images: hashes of the distinct images.
        made_with: number of shards by the package versions that built them.
    """

    shards: list[ShardEntry] = field(default_factory=list)
    sidecars: dict[str, str] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    images: set[str] = field(default_factory=set)
    made_with: Counter[str] = field(default_factory=Counter)
    with_image: int = 0
    text_tokens: int = 0
    supervised_tokens: int = 0
    index_sha256: str = ""

    def add(self, columns: dict[str, list[Any]]) -> None:
        self.samples.update(columns["source"])
        self.images.update(digest for digest in columns["picture_digest"] if digest is not None)
        self.with_image += sum(columns["has_image"])
        self.text_tokens += sum(columns["num_text_tokens"])
        self.supervised_tokens += sum(columns["num_supervised_tokens"])


@dataclass(frozen=True, kw_only=True)
class PublishedRejects:
    """Counts of the rejects in rejects.jsonl, and the sha256 of this file."""

    counts: RejectCounts
    sha256: str


def publish_index(folder: ShardFolder, tasks: Sequence[ShardTask]) -> SetContents:
    """Write index.parquet from the sidecars. Return the totals for the manifest.

    Raises: UserError if another build has replaced a sidecar.
    """
    contents = SetContents()
    with (
        published(folder.index) as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), INDEX_SCHEMA, compression="zstd") as index,
    ):
        for task in tasks:
            data = task.sidecar.read_bytes()
            sidecar = json.loads(data)
            if sidecar["spec_sha256"] != task.spec_sha256:
                raise UserError(
                    f"{task.sidecar} was changed by another build; run the same command again after it ends"
                )
            contents.sidecars[task.sidecar.name] = hashlib.sha256(data).hexdigest()
            contents.made_with[sidecar["made_with"]] += 1
            if sidecar["samples"]:
                index.write_table(_index_table(len(contents.shards), sidecar["columns"]))
                contents.add(sidecar["columns"])
                entry = ShardEntry(
                    name=task.tar.name, sha256=sidecar["sha256"], bytes=sidecar["bytes"], samples=sidecar["samples"]
                )
                contents.shards.append(entry)
    contents.index_sha256 = file.sha256
    return contents


def _index_table(shard: int, columns: dict[str, list[Any]]) -> pa.Table:
    columns = {"shard": [shard] * len(columns["key"]), **columns}
    return pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def publish_rejects(folder: ShardFolder, tasks: Sequence[ShardTask], sources: Sequence[str]) -> PublishedRejects:
    """Write rejects.jsonl from the early rejects and the rejects of the shards, ordered by source and then by row."""
    counts: RejectCounts = Counter()
    order = {name: position for position, name in enumerate(sources)}
    streams = read_rejects(folder.early_rejects), _shard_rejects(tasks)
    with published(folder.rejects) as file:
        for reject in heapq.merge(*streams, key=lambda reject: (order[reject.source], reject.row)):
            counts[reject.source, reject.reason] += 1
            file.write(reject.to_line())
    return PublishedRejects(counts=counts, sha256=file.sha256)


def _shard_rejects(tasks: Iterable[ShardTask]) -> Iterator[Reject]:
    for task in tasks:
        yield from (Reject(**entry) for entry in json.loads(task.sidecar.read_bytes())["rejects"])


def publish_manifest(
    folder: ShardFolder, inputs: ManifestInputs, contents: SetContents, rejects: PublishedRejects
) -> Manifest:
    """Write manifest.json, which makes the folder a shard set."""
    settings, tokenizer, rejected = inputs.settings, inputs.tokenizer, count_by_source(rejects.counts)
    manifest = Manifest(
        model=inputs.model,
        template=settings.template,
        tokenizer={name: getattr(tokenizer, name) for name in ("name", "sha256", "vocab_size", "eos_id")},
        image={"px": settings.image_px, "encoding": settings.encoding},
        max_text_tokens=settings.max_text_tokens,
        spec_sha256=inputs.spec_sha256,
        made_with=dict(contents.made_with),
        counts=_counts(inputs.rows, contents, rejects),
        sources={
            name: {"rows": rows, "samples": contents.samples[name], "rejects": rejected[name]}
            for name, rows in inputs.rows.items()
        },
        rejects_by_reason=dict(count_by_reason(rejects.counts)),
        shards=tuple(contents.shards),
        sidecars=contents.sidecars,
        index={"sha256": contents.index_sha256, "rows": contents.samples.total()},
        rejects={"sha256": rejects.sha256, "rows": rejects.counts.total()},
    )
    publish(folder.manifest, manifest.to_bytes())
    return Manifest.load(folder)


def _counts(rows: Counter[str], contents: SetContents, rejects: PublishedRejects) -> dict[str, int]:
    samples = contents.samples.total()
    counts = {
        "rows": rows.total(),
        "samples": samples,
        "rejects": rejects.counts.total(),
        "with_image": contents.with_image,
        "text_only": samples - contents.with_image,
        "pictures": len(contents.images),
        "text_tokens": contents.text_tokens,
        "supervised_tokens": contents.supervised_tokens,
    }
    assert counts["rows"] == samples + counts["rejects"], f"rows were lost or counted twice: {counts}"
    return counts
