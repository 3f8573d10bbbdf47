"""`ShardFolder`: the path of every file of a shard set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MANIFEST, INDEX, REJECTS, TOKENIZER = "manifest.json", "index.parquet", "rejects.jsonl", "tokenizer.json"
PROGRESS, WORK = "progress.json", ".work"


@dataclass(frozen=True)
class ShardFolder:
    """Paths of the files of a shard set. A `ShardFolder` can be used as a path itself (`os.PathLike`).

    A set consists of a manifest, an index, rejects, a tokenizer, and a tar and a sidecar per shard. `progress` and the
    files in `work` exist only during a build, except for `lock`, which is never removed.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def index(self) -> Path:
        return self.path / INDEX

    @property
    def rejects(self) -> Path:
        return self.path / REJECTS

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def progress(self) -> Path:
        return self.path / PROGRESS

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists by name."""
        return self.path / name

    def tar(self, shard: str) -> Path:
        """Return the path of the tar of a shard, such as `shard-00000`."""
        return self.path / f"{shard}.tar"

    def sidecar(self, shard: str) -> Path:
        """Return the path of the JSON file that describes a shard. It is written after the tar."""
        return self.path / f"{shard}.json"

    @property
    def work(self) -> Path:
        return self.path / WORK

    @property
    def lock(self) -> Path:
        return self.work / "lock"

    @property
    def dialogues(self) -> Path:
        """Return the path of the worklist, which has one line for each dialogue of each source."""
        return self.work / "dialogues.jsonl"

    @property
    def early_rejects(self) -> Path:
        """Return the path of the rejects that are found while the worklist is written, before any image is read."""
        return self.work / "rejects.jsonl"

    def last_seen(self, shard: str) -> Path:
        """Return the path where a task records its current row, so that a crash can be traced to that row."""
        return self.work / f"{shard}.crumb.tmp"
