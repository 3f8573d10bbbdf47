"""Download of benchmark data sets, with a local server in the place of the Hugging Face hub."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest

from pipeline.evaluation.benchmarks import BENCHMARKS
from tests.support.launch import run_python

DATA = b"PAR1 stands for a parquet file"


class Hub:
    """Files by data set and path, and the requests for file contents that the server answered."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                content = hub.answer(path)
                self.send_response(200 if content is not None else 404)
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("ETag", f'"{abs(hash(content))}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if self.command == "GET":
                    hub.requests.append(path)
                    self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> bytes | None:
        """Return the list of a data set's files, the content of a file, or None if there is no such path."""
        for name, files in self.files.items():
            if path == f"/api/datasets/{name}/tree/main":
                listed = [{"type": "file", "path": each, "size": len(data), "oid": "0"} for each, data in files.items()]
                return json.dumps(listed).encode()
            found = files.get(path.removeprefix(f"/datasets/{name}/resolve/main/"))
            if found is not None:
                return found
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def prefetch(hub: Hub, folder: Path, *names: str):
    words: list[str | Path] = ["-m", "pipeline.prefetch", "--benchmarks", folder, *names]
    return run_python(*words, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


def test_only_the_files_of_the_evaluated_split_and_configuration_are_downloaded(hub, tmp_path):
    hub.files = {
        BENCHMARKS["gqa"].hub_id: {
            f"{folder}/{split}-00000-of-00001.parquet": DATA
            for folder in ("testdev_balanced_instructions", "testdev_balanced_images", "testdev_all_images")
            for split in ("testdev", "test", "train")
        },
        BENCHMARKS["mmbench"].hub_id: {
            f"{folder}/dev-0000{i}-of-00002-6edc.parquet": DATA for folder in ("en", "cn") for i in range(2)
        },
    }
    done = prefetch(hub, tmp_path, "gqa", "mmbench")
    assert done.returncode == 0, done.stderr
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")) == [
        "gqa/testdev_balanced_images/testdev-00000-of-00001.parquet",
        "gqa/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
        "mmbench/en/dev-00000-of-00002-6edc.parquet",
        "mmbench/en/dev-00001-of-00002-6edc.parquet",
    ]
    assert all(BENCHMARKS[name].is_complete(tmp_path) for name in ("gqa", "mmbench"))
    (tmp_path / "mmbench/en/dev-00001-of-00002-6edc.parquet").unlink()
    assert not BENCHMARKS["mmbench"].is_complete(tmp_path)


def test_vsr_statements_are_packed_with_the_images_from_their_addresses(hub, tmp_path):
    statements = [
        {"image": f"{i % 2}.jpg", "image_link": f"{hub.url}/coco/{i % 2}.jpg", "caption": f"Statement {i}."}
        | {"label": i % 2, "relation": "under", "vote_true_validator_id": [1]}
        for i in range(3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in statements)
    hub.files = {
        BENCHMARKS["vsr"].hub_id: {"test.jsonl": text.encode(), "dev.jsonl": b""},
        "images": {f"/coco/{i}.jpg": f"image {i}".encode() for i in range(2)},
    }
    done = prefetch(hub, tmp_path, "vsr")
    assert done.returncode == 0, done.stderr
    assert BENCHMARKS["vsr"].is_complete(tmp_path)
    rows = pq.read_table(tmp_path / "vsr/data/test-00000-of-00001.parquet").to_pylist()
    assert [(row["caption"], row["label"], row["image"]["bytes"]) for row in rows] == [
        ("Statement 0.", 0, b"image 0"),
        ("Statement 1.", 1, b"image 1"),
        ("Statement 2.", 0, b"image 0"),
    ]
    assert sorted(path for path in hub.requests if path.startswith("/coco")) == ["/coco/0.jpg", "/coco/1.jpg"]


def test_all_data_sets_that_cannot_be_downloaded_are_listed_after_the_others(hub, tmp_path):
    hub.files = {
        BENCHMARKS["pope"].hub_id: {"data/test-00000-of-00001.parquet": DATA},
        BENCHMARKS["mme"].hub_id: {"README.md": b""},
    }
    done = prefetch(hub, tmp_path, "ai2d", "mme", "pope")
    assert done.returncode == 2
    assert "2 of 3 data sets were not downloaded" in done.stderr
    assert f"ai2d ({BENCHMARKS['ai2d'].hub_id}): " in done.stderr
    assert "mme (lmms-lab-encoder/MME): the hub has no files like data/test-*.parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert BENCHMARKS["pope"].is_complete(tmp_path)
