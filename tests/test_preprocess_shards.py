"""The shard format: samples, tars, the index, compatibility with webdataset, and atomic writes."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from skimage import data as photographs

from model.errors import UserError
from preprocess.atomic import publish, published
from preprocess.images.codec import encode_jpeg, encode_raw, encode_stored_image, resize_to_square
from preprocess.shards.manifest import INDEX_SCHEMA, Manifest, load_index
from preprocess.shards.sample import Sample, from_fields, from_payloads, sample_pixels, to_fields
from preprocess.shards.writer import write_shard

COFFEE = photographs.coffee()


def samples() -> list[Sample]:
    """Return a text-only sample and one sample of each image encoding."""
    tokens = np.array([1, 50_276, 0, 65_535], np.uint16)
    small = resize_to_square(COFFEE, 96)
    original = encode_stored_image(encode_jpeg(COFFEE), 96, "original")
    images = [(None, None), (encode_jpeg(small), "jpg"), (encode_raw(small), "pixels.npy"), original]
    return [
        Sample(
            key=f"{i:09d}",
            tokens=tokens[: i + 1],
            spans=[(0, i + 1)],
            image=image,
            image_format=form,
            source="ünï",
            id=f"id.{i}",
            row=i,
            image_path="a/b.c.jpg" if image else None,
        )
        for i, (image, form) in enumerate(images)
    ]


def same(one: Sample, other: Sample) -> bool:
    return one.__dict__ | {"tokens": one.tokens.tolist()} == other.__dict__ | {"tokens": other.tokens.tolist()}


def test_encoding_and_decoding_a_sample_restores_it() -> None:
    for sample in samples():
        assert same(from_fields(to_fields(sample), sample.key), sample)


def test_the_webdataset_package_reads_every_field_of_every_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.tar", samples())
    read = list(webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples()]
    for sample, fields in zip(samples(), read, strict=True):
        assert {name: data for name, data in fields.items() if not name.startswith("__")} == to_fields(sample)
        assert same(from_fields(fields, fields["__key__"]), sample)


def test_webdatasets_decoders_decode_tokens_spans_and_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-00000.tar", samples())
    decoded = webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False).decode("rgb8")
    for sample, fields in zip(samples(), decoded, strict=True):
        assert fields["tokens.npy"].tolist() == sample.tokens.tolist()
        assert fields["json"]["spans"] == [list(span) for span in sample.spans]
        if sample.image_format in ("jpg", "pixels.npy"):
            assert np.array_equal(fields[sample.image_format], sample_pixels(sample))


def test_the_index_points_to_the_payloads_in_the_tar(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "shard-00000.tar", samples())
    assert set(INDEX_SCHEMA.names) - {"shard"} <= set(written.columns)
    data = (tmp_path / "shard-00000.tar").read_bytes()
    for i, sample in enumerate(samples()):
        at = {name: column[i] for name, column in written.columns.items()}
        tokens, meta, image = (
            data[at[f"{part}_offset"] : at[f"{part}_offset"] + at[f"{part}_bytes"]]
            for part in ("tokens", "meta", "image")
        )
        assert same(
            from_payloads(at["key"], tokens=tokens, meta=meta, image=image or None, image_format=sample.image_format),
            sample,
        )
        assert (at["num_text_tokens"], at["num_supervised_tokens"], at["has_image"]) == (i + 1, i + 1, i > 0)


def test_tar_bytes_do_not_depend_on_the_user_or_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_shard(tmp_path / "one.tar", samples())
    monkeypatch.setenv("USER", "somebody")
    old = os.umask(0o077)
    try:
        two = write_shard(tmp_path / "two.tar", iter(samples()))
    finally:
        os.umask(old)
    data = (tmp_path / "one.tar").read_bytes()
    assert data == (tmp_path / "two.tar").read_bytes()
    assert one == two
    assert (one.sha256, one.bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_the_tokens_field_has_the_bytes_that_numpy_save_writes() -> None:
    for sample in samples():
        buffer = io.BytesIO()
        np.save(buffer, sample.tokens)
        assert to_fields(sample)["tokens.npy"] == buffer.getvalue()


def test_a_shard_has_the_same_bytes_as_a_tar_written_by_tarfile(tmp_path: Path) -> None:
    write_shard(tmp_path / "ours.tar", samples())
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples():
            for name, data in to_fields(sample).items():
                member = tarfile.TarInfo(f"{sample.key}.{name}")
                member.size, member.mode, member.uname, member.gname = len(data), 0o444, "emma", "emma"
                tar.addfile(member, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_raw_images_are_exact_jpegs_are_close_and_originals_keep_their_size() -> None:
    exact = resize_to_square(COFFEE, 96)
    _, jpeg, raw, original = samples()
    assert np.array_equal(sample_pixels(raw), exact)
    assert np.abs(sample_pixels(jpeg).astype(int) - exact).mean() < 3
    assert sample_pixels(original).shape == (400, 600, 3)
    assert np.array_equal(sample_pixels(original, 96), resize_to_square(sample_pixels(original), 96))


def test_a_shard_without_samples_has_no_tar(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "shard-00000.tar", []).samples == 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_atomic_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), published(tmp_path / "file") as file:
        file.write(b"half of")
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_publish_replaces_an_existing_file_and_returns_the_sha256(tmp_path: Path) -> None:
    publish(tmp_path / "file", b"old")
    assert publish(tmp_path / "file", b"new") == hashlib.sha256(b"new").hexdigest()
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "seal": ""}'])
def test_an_invalid_shard_manifest_is_a_user_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json (is damaged|has format)"):
        Manifest.load(tmp_path)


def test_a_missing_or_damaged_index_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        load_index(tmp_path)
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is damaged"):
        load_index(tmp_path)
