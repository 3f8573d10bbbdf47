"""Download of the benchmarks' data sets from the Hugging Face hub, in the layout that the evaluation reads."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError, first_line
from pipeline.evaluation.benchmarks import Benchmark
from preprocess.annotations.reader import read_rows
from preprocess.atomic import publish

VSR_STATEMENTS = "test.jsonl"
CONNECTIONS, ATTEMPTS, TIMEOUT_S, PAUSE_S = 16, 5, 60, 2.0
MIB = 1 << 20


def download(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """Download the data sets of the benchmarks into `folder`. Files that are there already are not downloaded again.

    Raises: UserError, after all other data sets are downloaded, that lists those which could not be downloaded.
    """
    failed = [error for benchmark in benchmarks if (error := _try_download(benchmark, folder / benchmark.name))]
    if failed:
        raise UserError(f"{len(failed)} of {len(benchmarks)} data sets were not downloaded:\n  " + "\n  ".join(failed))


def _try_download(benchmark: Benchmark, folder: Path) -> str:
    """Download one data set and print its size. Return the error message, or an empty string on success."""
    try:
        files, size = _download(benchmark, folder)
    except Exception as error:  # being offline, an unknown id and a full disk raise unrelated classes
        return f"{benchmark.name} ({benchmark.hub_id}): {first_line(error)}"
    print(f"{benchmark.name:<15} {benchmark.hub_id}: {files} file(s), {size / MIB:.0f} MiB", flush=True)
    return ""


def _download(benchmark: Benchmark, folder: Path) -> tuple[int, int]:
    """Download one data set. Return the number of its files and their size in bytes."""
    listed = list(huggingface_hub.HfApi().list_repo_tree(benchmark.hub_id, repo_type="dataset", recursive=True))
    paths = [entry.path for entry in listed if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
    if benchmark.stock:
        wanted = [
            path for path in paths if any(PurePosixPath(path).match(each) for each in benchmark.patterns.values())
        ]
    else:
        wanted = [path for path in paths if path == VSR_STATEMENTS]
    if not wanted:
        raise UserError(f"the hub has no files like {', '.join(benchmark.patterns.values())}")
    files = [
        Path(huggingface_hub.hf_hub_download(benchmark.hub_id, path, repo_type="dataset", local_dir=folder))
        for path in wanted
    ]
    if not benchmark.stock:
        files = [_pack_vsr(files[0], folder / "data/test-00000-of-00001.parquet")]
    return len(files), sum(file.stat().st_size for file in files)


def _pack_vsr(statements: Path, path: Path) -> Path:
    """Download the images of VSR's statements from their addresses, and pack both into a parquet file."""
    if path.exists():
        return path
    rows: list[Any] = list(read_rows(statements))
    links = {row["image"]: row["image_link"] for row in rows}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        images = dict(zip(links, pool.map(_fetch, links.values()), strict=True))
    columns = {name: [row[name] for row in rows] for name in ("caption", "label", "relation")}
    columns["image"] = [{"bytes": images[row["image"]], "path": row["image"]} for row in rows]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    path.parent.mkdir(exist_ok=True)
    publish(path, buffer.getvalue().to_pybytes())
    return path


def _fetch(link: str) -> bytes:
    """Return the content at an address. A failed attempt is repeated, unless the server has no such file."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(link, timeout=TIMEOUT_S) as response:
                return response.read()
        except OSError as error:  # noqa: PERF203
            missing = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if missing or attempt == ATTEMPTS:
                raise UserError(f"{link} cannot be downloaded ({first_line(error)})") from None
            time.sleep(PAUSE_S)
    raise AssertionError
