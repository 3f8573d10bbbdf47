"""Annotation files are streamed, whatever they are packed in, and damage is named by place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from preprocess import rows
from preprocess.rejects import Rejected
from preprocess.rows import read_rows

ROWS: list[Any] = [
    {"id": "a", "conversations": [{"from": "human", "value": 'brackets ]}[{ and "quotes" \\ "'}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "ünïcödé 猫\n" * 50}]},
    12345,
    -1.5e10,
    None,
    True,
    [],
    {},
    "text",
    {"id": "z", "nested": {"deep": [[1, 2], {"x": "y" * 500}]}},
]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def packings(folder: Path) -> dict[str, Path]:
    array, lines = json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))
    zstd = folder / "rows.json.zst"
    with pa.CompressedOutputStream(pa.OSFile(str(zstd), "wb"), "zstd") as stream:
        stream.write(array.encode())
    (folder / "rows.json.gz").write_bytes(gzip.compress(array.encode()))
    return {
        "array": write(folder / "a.json", array),
        "indented": write(folder / "i.json", "\n\n " + json.dumps(ROWS, indent=4, ensure_ascii=False) + "\n"),
        "with a byte order mark": write(folder / "m.json", "\ufeff" + array),
        "lines": write(folder / "l.jsonl", lines),
        "lines that end in CR LF, with gaps": write(folder / "c.jsonl", lines.replace("\n", "\r\n\r\n") + "\r\n"),
        "gzip": folder / "rows.json.gz",
        "zstd": zstd,
    }


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_every_packing_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
    for packing, path in packings(tmp_path).items():
        assert list(read_rows(path)) == ROWS, packing


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    table = [{"id": str(i), "conversations": [{"from": "human", "value": "Q"}]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == table


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_an_empty_file_has_no_rows(tmp_path: Path, text: str) -> None:
    assert list(read_rows(write(tmp_path / "empty.json", text))) == []


BROKEN = {
    "cut short in a string": ('[{"id": "a"},\n {"id": "b', "line 2 column 9: broken JSON (Unterminated string"),
    "cut short between rows": ('[{"id": "a"},\n', "line 2 column 1: broken JSON"),
    "cut short before a comma": ('[{"id": "a"}\n', "line 2 column 1: expected ',' or ']' after a row, the file ends"),
    "no comma": ('[{"id": "a"}\n {"id": "b"}]', "line 2 column 2: expected ',' or ']' after a row, found '{'"),
    "a bare word": ('[\n{"id": a},' + " " * 100 + "1]", "line 2 column 8: broken JSON (Expecting value)"),
    "nested without end": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_array_is_named_with_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    text, complaint = BROKEN[kind]
    if chunk == 3 and kind == "nested without end":
        return  # quadratic, and the same code
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
    with pytest.raises(UserError) as raised:
        list(read_rows(write(tmp_path / "rows.json", text)))
    assert f"{tmp_path}/rows.json, " in str(raised.value)
    assert complaint in str(raised.value)


def test_a_broken_line_costs_only_itself(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "rows.jsonl", '{"id": 1}\n{"id": }\n\n{"id": 3')))
    assert found[0] == {"id": 1}
    assert [str(row) for row in found[1:]] == [
        "broken_json: line 2 column 8: Expecting value",
        "broken_json: line 4 column 9: Expecting ',' delimiter",
    ]
    assert all(isinstance(row, Rejected) for row in found[1:])


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.json.zst", "rows.parquet"])
def test_a_damaged_archive_is_one_clear_line(tmp_path: Path, name: str) -> None:
    path = packings(tmp_path).get({"rows.json.gz": "gzip", "rows.json.zst": "zstd"}.get(name, ""), tmp_path / name)
    if name == "rows.parquet":
        pq.write_table(pa.table({"id": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="fetch it again"):
        list(read_rows(path))


def test_reading_holds_a_window_not_the_file(tmp_path: Path) -> None:
    """Fifty times the window passes through it."""
    row = json.dumps({"id": "x" * 1000})
    path = write(tmp_path / "rows.json", "[" + ",".join([row] * 50_000) + "]")
    stream = read_rows(path)
    next(stream)
    text = stream.gi_frame.f_locals["text"]  # type: ignore[attr-defined]
    longest = 0
    for _ in stream:
        longest = max(longest, len(text.window))
    assert longest < 3 * rows.CHUNK_BYTES
