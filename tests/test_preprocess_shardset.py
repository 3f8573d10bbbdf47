"""The shardset commands: verify, which finds damage, and info and preview, which show the contents of a set."""

import errno
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.errors import ExitCode, UserError
from model.hashing import file_sha256
from preprocess.prompts import load_tokenizer
from preprocess.rejects import Reject
from preprocess.shards.folder import MANIFEST
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.preview import choose_rejects, choose_rows
from preprocess.shards.verify import verify
from preprocess.shardset import info, main
from tests.support.shard_builds import build_in_process, exit_code_of, write_mix
from tests.support.tiny_data import write_byte_tokenizer


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set of three shards with image and text-only samples, and a fourth shard without samples.

    The texts contain HTML markup, which the preview must escape.
    """
    root = tmp_path_factory.mktemp("root")
    tokenizer = load_tokenizer(write_byte_tokenizer(root / "bytes"))
    Image.linear_gradient("L").save(root / "grey.png")
    rows: list[dict[str, object]] = [
        {"id": f"r{i}", "conversations": [{"from": "human", "value": "<b>&"}, {"from": "gpt", "value": "ja" * i}]}
        for i in range(12)
    ]
    for row in rows[::2]:
        row["image"] = "grey.png"
    rows += [{"id": "lost", "image": "lost.png", "conversations": rows[0]["conversations"]}] * 4
    (root / "rows.json").write_text(json.dumps(rows))
    write_mix(root, [{"name": "rows", "format": "llava", "annotations": "rows.json"}])
    options = {"model": "tiny_v2", "samples_per_shard": 4, "max_reject_ratio": 0.5}
    return build_in_process(root, tmp_path_factory.mktemp("intact") / "set", tokenizer, **options)


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "copy"))


def problems(folder: Path) -> list[str]:
    try:
        return list(verify(folder))
    except UserError as error:
        return [str(error)]


def test_verify_reports_an_intact_set_as_intact(intact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(intact)]) == 0
    assert "is intact: 12 samples" in capsys.readouterr().out
    assert (intact / "shard-00003.json").exists()
    assert not (intact / "shard-00003.tar").exists(), "a shard without samples must have no tar"


def test_verify_names_any_file_that_has_a_flipped_bit(intact: Path, copy: Path) -> None:
    for path in sorted(path for path in copy.iterdir() if path.is_file()):
        data = path.read_bytes()
        for position in range(0, len(data), max(1, len(data) // 12)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            found = problems(copy)
            assert any(path.name in problem for problem in found), f"{path.name}, byte {position}: {found}"
        path.write_bytes(data)
    assert problems(copy) == []


def test_loading_detects_a_flipped_bit_in_any_byte_of_the_manifest(copy: Path) -> None:
    path = copy / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        try:
            assert Manifest.load(copy).to_bytes() != damaged, f"a change of byte {position} was not detected"
        except UserError:
            continue


@pytest.mark.parametrize(
    "name", ["shard-00001.tar", "shard-00001.json", "index.parquet", "rejects.jsonl", "tokenizer.json"]
)
def test_verify_reports_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{name} is missing" in problems(copy)


def test_verify_reports_files_that_do_not_belong_to_the_set(copy: Path) -> None:
    (copy / "shard-00007.tar").write_bytes(b"of another set")
    (copy / "notes.txt").write_text("mine")
    assert problems(copy) == ["notes.txt does not belong to the set", "shard-00007.tar does not belong to the set"]


def test_verify_reports_two_swapped_shards(copy: Path) -> None:
    (copy / "shard-00000.tar").rename(copy / "x")
    (copy / "shard-00001.tar").rename(copy / "shard-00000.tar")
    (copy / "x").rename(copy / "shard-00001.tar")
    assert {"shard-00000.tar", "shard-00001.tar"} <= {problem.split()[0] for problem in problems(copy)}


FORGERIES = {
    "counts": ({"text_tokens": 1}, "text_tokens is 1, found"),
    "max_text_tokens": (10, "tokens of uint16, expected 1 to 10"),
    "tokenizer": ({"vocab_size": 50}, "token id"),
    "image": ({"px": 64}, "the image is (100, 100, 3), expected (64, 64, 3)"),
    "sources": ({"rows": {"rows": 17, "samples": 12, "rejects": 4}}, "1 of 17 rows are neither sample nor reject"),
}


def forge(folder: Path, name: str, value: object) -> None:
    """Replace a value in the manifest, and update the checksum of the manifest."""
    table = json.loads((folder / MANIFEST).read_bytes())
    table[name] = table[name] | value if isinstance(value, dict) else value
    known = {key: table[key] for key in table if key not in ("seal", "format", "shards")}
    forged = Manifest(**known, shards=Manifest.load(folder).shards)
    (folder / MANIFEST).write_bytes(forged.to_bytes())


@pytest.mark.parametrize("name", FORGERIES)
def test_verify_reports_contents_that_contradict_the_manifest(copy: Path, name: str) -> None:
    value, complaint = FORGERIES[name]
    forge(copy, name, value)
    assert any(complaint in problem for problem in problems(copy)), problems(copy)


def test_verify_reports_an_index_with_a_wrong_offset(copy: Path) -> None:
    index = load_index(copy).to_pydict()
    index["image_offset"][0] += 1
    table = load_index(copy).schema.empty_table().from_pydict(index, schema=load_index(copy).schema)
    pq.write_table(table, copy / "index.parquet")
    forge(copy, "index", {"sha256": file_sha256(copy / "index.parquet")})
    assert (
        "shard-00000.tar, sample 000000000: the image at the index's offset is not what webdataset reads"
        in problems(copy)
    )


def test_verify_reports_a_changed_index_and_still_checks_the_tars(copy: Path) -> None:
    (copy / "index.parquet").write_bytes(b"")
    forge(copy, "counts", {"text_tokens": 1})
    found = problems(copy)
    assert found[0] == "index.parquet has changed since it was written: its sha256 differs"
    assert any("text_tokens is 1, found" in problem for problem in found)


def test_loading_an_index_with_a_flipped_bit_succeeds_or_raises_a_user_error(copy: Path) -> None:
    path = copy / "index.parquet"
    data, refused = path.read_bytes(), 0
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            load_index(copy).to_pylist()
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path} is damaged (")
    assert refused > 100


def test_verify_exits_with_the_damaged_code_and_suggests_a_remedy(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "shard-00002.tar").write_bytes(b"")
    assert exit_code_of(main, ["verify", str(copy)]) == ExitCode.DAMAGED
    output = capsys.readouterr().out
    assert "shard-00002.tar has changed since it was written" in output
    assert "delete the files named above and run build_shards.py with the same arguments again" in output


@pytest.mark.parametrize("verb", ["verify", "info", "preview"])
@pytest.mark.parametrize("folder", ["nowhere", "unfinished", "other"])
def test_shardset_commands_on_a_folder_without_a_set_are_a_one_line_user_error(
    tmp_path: Path, verb: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished" / ".work").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert exit_code_of(main, [verb, str(tmp_path / folder)]) == ExitCode.USER_ERROR
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    expected = {"nowhere": "no such folder", "unfinished": "is an unfinished shard set", "other": "is not a shard set"}
    assert expected[folder] in output


PREVIEWS = {
    "a negative number": (["--samples", "-1"], None, "--samples is -1, expected 0 or more"),
    "a missing folder": (
        ["--out", "/nowhere/page.html"],
        None,
        "there is no folder /nowhere; create it, or give another",
    ),
    "a folder for a page": (
        ["--out", "/"],
        None,
        "--out / is a folder, expected a file name such as /preview.html",
    ),
    "a missing tar": ([], "shard-00001.tar", "shard-00001.tar is missing or damaged (["),
    "a missing tokenizer": ([], "tokenizer.json", "tokenizer.json is missing or damaged (["),
    "missing rejects": ([], "rejects.jsonl", "rejects.jsonl is missing or damaged (["),
}


@pytest.mark.parametrize("mistake", PREVIEWS)
def test_a_preview_that_cannot_be_created_is_a_one_line_user_error(
    copy: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, missing, complaint = PREVIEWS[mistake]
    if missing:
        (copy / missing).unlink()
    assert exit_code_of(main, ["preview", str(copy), *words]) == ExitCode.USER_ERROR
    output = capsys.readouterr().err
    assert complaint in output
    assert output.count("\n") == 1
    assert not missing or f"`python -m preprocess.shardset verify {copy}` lists all damage" in output


def test_the_preview_error_for_a_damaged_tar_names_the_tar(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = copy / "shard-00001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert exit_code_of(main, ["preview", str(copy)]) == ExitCode.USER_ERROR
    assert "shard-00001.tar is missing or damaged (" in capsys.readouterr().err


def test_the_preview_of_the_working_directory_is_written_next_to_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert main(["preview", "."]) == 0
    assert copy.with_name("copy-preview.html").is_file()
    assert problems(copy) == [], "the page was written into the folder of the set"


def test_the_preview_includes_rejects_of_every_reason_and_source(tmp_path: Path) -> None:
    kinds = [("a", "missing_key")] * 1000 + [("a", "no_answer")] + [("b", "broken_json")] * 2
    lines = [
        Reject(source=source, row=row, id="", reason=reason, detail="").to_line()
        for row, (source, reason) in enumerate(kinds)
    ]
    (tmp_path / "rejects.jsonl").write_bytes(b"".join(lines))
    chosen = choose_rejects(tmp_path / "rejects.jsonl", 50)
    assert [reject.row for reject in chosen[-4:]] == [999, 1000, 1001, 1002]
    assert len(chosen) == 50


def test_shardset_info_prints_a_summary_of_the_set(intact: Path) -> None:
    output = "\n".join(info(intact))
    assert "12 samples in 3 shards" in output
    assert "6 with an image (1 distinct), 6 text-only" in output
    assert re.search(r"rows +16 +12 +4\n", output)
    assert "4  picture_missing: the image file does not exist" in output


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "mark":
            self.marked.append(data)


def test_the_preview_is_a_single_html_page_without_external_files(intact: Path, tmp_path: Path) -> None:
    assert main(["preview", str(intact), "--out", str(tmp_path / "page.html"), "--samples", "9"]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert sum(tag == "article" for tag, _ in page.tags) == 9
    sources = [about["src"] for tag, about in page.tags if tag == "img"]
    assert sources
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert {about["href"] for _, about in page.tags if "href" in about} == {"#rejects"}
    assert "ja<|endoftext|>" in page.marked, "supervised text is not marked"
    assert "&lt;b&gt;&amp;" in text, "markup in the data is not escaped"
    assert text.count("picture_missing") == 4


def test_the_preview_selects_samples_spread_over_every_source() -> None:
    sources = np.array(["a"] * 1000 + ["b"] * 3 + ["c"] * 50, dtype=object)
    rows = choose_rows(sources, 23)
    assert len(rows) == 23
    assert {name: sum(sources[row] == name for row in rows) for name in "abc"} == {"a": 10, "b": 3, "c": 10}
    assert rows[0] == 0
    assert 999 in rows


@pytest.mark.parametrize(
    ("number", "code", "output"),
    [
        (errno.EIO, ExitCode.RETRY, "Input/output error; try again"),
        (errno.EACCES, ExitCode.USER_ERROR, "index.parquet cannot be read"),
    ],
)
def test_shardset_info_reports_an_unreadable_index_in_one_line(
    intact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: ExitCode,
    output: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("preprocess.shards.manifest.pq.read_table", fails)
    assert exit_code_of(main, ["info", str(intact)]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert output in line
