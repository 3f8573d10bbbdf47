"""Raw data at a URL: builds, archives, missing and oversized images, and unsupported URLs."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from model.errors import ExitCode, UserError
from preprocess import build_shards
from preprocess.images import store as image_store
from preprocess.images.store import ImageStore, sha256_hex
from preprocess.rejects import Rejected
from preprocess.remote_path import RemotePath, parse_path
from tests.support.golden_tokenizer import gpt_neox
from tests.support.shard_builds import arguments, build_in_process, exit_code_of, write_mix
from tests.test_preprocess_image_store import LAYOUTS


@pytest.fixture
def bucket() -> Iterator[str]:
    """Return the URL of an empty folder in the in-memory file system of fsspec."""
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def upload(folder: Path, url: str) -> None:
    fsspec.filesystem("memory").put(str(folder), url, recursive=True)


def raw_data(root: Path) -> Path:
    """Write rows about two existing images and a missing image. Return the data root."""
    (root / "images").mkdir(parents=True)
    conversation = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(i), "image": f"{i % 3}.png", "conversations": conversation} for i in range(9)]
    for i in range(2):
        Image.new("RGB", (40 + i, 30), (200, 90 * i, 20)).save(root / f"images/{i}.png")
    (root / "rows.json").write_text(json.dumps(rows))
    write_mix(root, [{"name": "a", "format": "llava", "annotations": "rows.json", "images": "images"}])
    return root


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("shard-*")}


def test_building_from_a_url_gives_the_same_tars_as_from_the_local_folder(bucket: str, tmp_path: Path) -> None:
    root = raw_data(tmp_path / "root")
    local = build_in_process(root, tmp_path / "local", gpt_neox(), max_reject_ratio=0.5)
    upload(root, bucket)
    words = arguments(root, tmp_path / "remote", gpt_neox(), workers=0, max_reject_ratio=0.5)
    assert build_shards.main([*words, "--root", bucket]) == 0
    remote = {name: data for name, data in tars(tmp_path / "remote").items() if name.endswith(".tar")}
    assert remote == {name: data for name, data in tars(local).items() if name.endswith(".tar")}
    assert (tmp_path / "remote/rejects.jsonl").read_bytes() == (local / "rejects.jsonl").read_bytes()


def test_ray_workers_build_from_a_url(tmp_path: Path) -> None:
    root = raw_data(tmp_path / "root")
    local = build_in_process(root, tmp_path / "local", gpt_neox(), max_reject_ratio=0.5)
    words = arguments(root, tmp_path / "remote", gpt_neox(), workers=1, max_reject_ratio=0.5)
    assert build_shards.main([*words, "--root", f"file://{root}"]) == 0
    assert tars(tmp_path / "remote").keys() == tars(local).keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_read_from_an_archive_at_a_url_without_unpacking_it(
    bucket: str, tmp_path: Path, layout: str
) -> None:
    write, archive, member, archives = LAYOUTS[layout]
    write(tmp_path / "root" / archive, {"other.txt": b"no", member: b"image"})
    upload(tmp_path / "root", bucket)
    store = ImageStore(parse_path(bucket), archives)
    assert store.read("coco/train2017/1.jpg") == b"image"
    with pytest.raises(Rejected, match="picture_missing: no such member of"):
        store.read("coco/train2017/2.jpg")


def test_an_image_that_does_not_exist_at_its_url_is_rejected_as_missing(bucket: str, tmp_path: Path) -> None:
    upload(raw_data(tmp_path / "root"), bucket)
    store = ImageStore(parse_path(bucket), {})
    assert store.has_folder("images")
    assert not store.has_folder("photographs")
    assert store.size("images/0.png") == (tmp_path / "root/images/0.png").stat().st_size
    assert store.size("images/7.png") is None
    assert store.fingerprint("images/0.png") == sha256_hex((tmp_path / "root/images/0.png").read_bytes())
    assert store.fingerprint("images/7.png") == "picture_missing"
    with pytest.raises(Rejected, match="picture_missing"):
        store.read("images/7.png")


def test_an_oversized_image_at_a_url_is_rejected_without_a_full_download(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "MAX_FILE_BYTES", 10)
    for size in (10, 30):
        (tmp_path / f"{size}.jpg").write_bytes(bytes(size))
    upload(tmp_path, bucket)
    store = ImageStore(parse_path(bucket), {})
    assert store.read("10.jpg") == bytes(10)
    with pytest.raises(Rejected, match="picture_too_large: 30 bytes, at most 10"):
        store.read("30.jpg")
    assert RemotePath(f"{bucket}/30.jpg").read_bytes(11) == bytes(11)


def test_an_empty_object_is_read_although_its_range_requests_fail(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores answer a range request for an empty object with an error."""

    def no_range(path: str, start: int, end: int) -> bytes:
        raise OSError(f"416: {path} has no bytes {start}-{end}")

    for name, data in (("empty.jpg", b""), ("whole.jpg", b"image")):
        (tmp_path / name).write_bytes(data)
    upload(tmp_path, bucket)
    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", no_range)
    assert ImageStore(parse_path(bucket), {}).read("empty.jpg") == b""
    with pytest.raises(OSError, match="416"):
        ImageStore(parse_path(bucket), {}).read("whole.jpg")


def test_an_unsupported_url_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = raw_data(tmp_path / "root")
    words = [*arguments(root, tmp_path / "out", gpt_neox(), workers=0), "--root", "nowhere://bucket"]
    assert exit_code_of(build_shards.main, words) == ExitCode.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere://bucket cannot be read: Protocol not known: nowhere")
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        RemotePath("nowhere://bucket/1.jpg").read_bytes(1)
