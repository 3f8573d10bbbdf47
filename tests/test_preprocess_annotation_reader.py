"""The annotation reader: JSON, JSONL, Parquet and compressed files, errors with line and column, and memory use."""

import bz2
import gzip
import io
import json
import lzma
import struct
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from preprocess.annotations import json_rows, reader
from preprocess.annotations.reader import read_rows
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath

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


def files_of_every_format(folder: Path) -> dict[str, Path]:
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


def recorded_windows(monkeypatch: pytest.MonkeyPatch) -> list[json_rows.TextWindow]:
    """Return a list that will hold the window of each file that is read from now on."""
    windows: list[json_rows.TextWindow] = []

    class Recorded(json_rows.TextWindow):
        def __init__(self, stream: IO[bytes], path: AnyPath, head: bytes) -> None:
            super().__init__(stream, path, head)
            windows.append(self)

    monkeypatch.setattr(reader, "TextWindow", Recorded)
    return windows


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_the_same_rows_are_read_from_every_json_format_and_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    for file_format, path in files_of_every_format(tmp_path).items():
        assert list(read_rows(path)) == ROWS, file_format


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_line_of_jsonl(tmp_path: Path, separator: str) -> None:
    """`str.splitlines` would also split at these characters, of which JSON strings may contain the first three."""
    row = {"id": f"before{separator}after"}
    lines = [json.dumps(row, ensure_ascii=separator < " "), json.dumps({"id": 2})]
    assert list(read_rows(write(tmp_path / "rows.jsonl", "\n".join(lines)))) == [row, {"id": 2}]


ROWS_WITH_MARKS = {
    "joined files with byte order marks": '\ufeff{"id": 1}\n\ufeff{"id": 2}\n',
    "carriage returns alone": '{"id": 1}\r{"id": 2}\r',
    "carriage returns alone, joined with newlines": '{"id": 1}\r{"id": 2}\n',
    "a carriage return within a row": '{"id":\r1}\n{"id": 2}\n',
}


@pytest.mark.parametrize("kind", ROWS_WITH_MARKS)
def test_byte_order_marks_and_carriage_returns_between_rows_are_ignored(tmp_path: Path, kind: str) -> None:
    assert list(read_rows(write(tmp_path / "rows.jsonl", ROWS_WITH_MARKS[kind]))) == [{"id": 1}, {"id": 2}]


def test_rows_are_read_with_their_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / "rows.parquet")
    files = [tmp_path / "rows.parquet", write(tmp_path / "l", '\n{"id": 1}\n\n{'), write(tmp_path / "a", "[\n1, 2]")]
    places = [[place for place, _ in reader.rows_with_place(path)] for path in files]
    assert places == [["row 1", "row 2"], ["line 2", "line 4"], ["line 2", "line 2"]]


def test_rows_are_read_from_a_parquet_file(tmp_path: Path) -> None:
    table = [{"id": str(i), "conversations": [{"from": "human", "value": "Q"}]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == table


def test_a_parquet_file_with_fewer_rows_than_its_footer_declares_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flipped bits in the footer can cause this damage, for which pyarrow raises no error."""
    pq.write_table(pa.table({"id": ["a", "b"]}), tmp_path / "rows.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match="its footer declares 2 rows, but it holds 0"):
        list(read_rows(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_an_empty_annotation_file_has_no_rows(tmp_path: Path, text: str) -> None:
    assert list(read_rows(write(tmp_path / "empty.json", text))) == []


BROKEN = {
    "cut short in a string": ('[{"id": "a"},\n {"id": "b', "line 2 column 9: broken JSON (Unterminated string"),
    "cut short between rows": ('[{"id": "a"},\n', "line 2 column 1: broken JSON"),
    "cut short before a comma": (
        '[{"id": "a"}\n',
        "line 2 column 1: expected ',' or ']' after a row, found the end of the file",
    ),
    "no comma": ('[{"id": "a"}\n {"id": "b"}]', "line 2 column 2: expected ',' or ']' after a row, found '{'"),
    "a bare word": ('[\n{"id": a},' + " " * 100 + "1]", "line 2 column 8: broken JSON (Expecting value)"),
    "a number with too many digits": (
        '[{"id": 1},\n {"id": ' + "1" * 5000 + "}]",
        "line 2 column 2: broken JSON (a number has too many",
    ),
    "two arrays": ("[1,\n2]\n[3]", "line 3 column 1: expected the end of the file after the array's ']', found '['"),
    "two arrays of rows, a line each": (
        '[{"id": 1}]\n\n[{"id": 2}]\n',
        "line 3 column 1: expected the end of the file",
    ),
    "an array of rows, and a row of another kind of file": (
        '[{"id": 1}, {"id": 2}]\n{"id": 3}\n',
        "line 2 column 1: expected the end of the file after the array's ']', found '{'",
    ),
    "an empty array and more": ("[] {}", "line 1 column 4: expected the end of the file"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("kind", BROKEN)
def test_the_error_for_a_malformed_json_array_names_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    text, message = BROKEN[kind]
    if chunk == 3 and kind == "nested too deeply":
        return  # this combination would take quadratic time, and the larger chunk already covers this code
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    with pytest.raises(UserError) as raised:
        list(read_rows(write(tmp_path / "rows.json", text)))
    assert f"{tmp_path}/rows.json, " in str(raised.value)
    assert message in str(raised.value)


def test_a_malformed_jsonl_line_is_rejected_and_the_other_lines_are_read(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "rows.jsonl", '{"id": 1}\n{"id": }\n\n{"id": 3')))
    assert found[0] == {"id": 1}
    assert [str(row) for row in found[1:]] == [
        "broken_json: line 2 column 8: Expecting value",
        "broken_json: line 4 column 9: Expecting ',' delimiter",
    ]
    assert all(isinstance(row, Rejected) for row in found[1:])


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_an_array_on_the_first_line_of_a_jsonl_file_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    for first, then in [("[]", "{}"), ('["Q", "A"]', '{"id": 1}'), ('["Q"]', '["A"]')]:
        path = write(tmp_path / "rows.jsonl", f" {first} \n\n {then}\n{{}}")
        assert list(read_rows(path)) == [json.loads(first), json.loads(then), {}]


def test_rows_of_a_long_one_line_array_are_read_before_its_end_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(json_rows, "MAX_FIRST_LINE_CHARACTERS", 1000)
    path = write(tmp_path / "rows.json", json.dumps([{"id": i} for i in range(10_000)]) + "\n")
    windows, stream = recorded_windows(monkeypatch), read_rows(path)
    assert next(stream) == {"id": 0}
    assert len(windows[0].window) < 3000
    assert len(list(stream)) == 9999


def test_a_number_with_too_many_digits_rejects_only_its_jsonl_line(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "rows.jsonl", f'{{"id": {"1" * 5000}}}\n{{"id": 2}}')))
    assert str(found[0]) == "broken_json: line 1: a number has too many digits"
    assert found[1:] == [{"id": 2}]


OBJECT = '{"annotations": [' + ", ".join(['{"id": 1}'] * 500) + "]}"
NOT_ROWS = {
    "one object": (
        OBJECT,
        "line 1 column 1: the file is a single object (more than 1000 characters, expected a JSON",
    ),
    "an overlong line": ('{"id": 1}\n' + OBJECT, "line 2 column 1: the line is too long for a row (more than 1000"),
    "an overlong row of an array": (f"[{OBJECT}]", "line 1 column 2: a row has more than 1000 characters"),
}


@pytest.mark.parametrize("kind", NOT_ROWS)
def test_an_overlong_row_is_a_user_error_before_it_is_read_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(json_rows, "MAX_FIRST_LINE_CHARACTERS", 100)
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARACTERS", 1000)
    text, message = NOT_ROWS[kind]
    with pytest.raises(UserError) as raised:
        list(read_rows(write(tmp_path / "rows.json", text)))
    assert message in str(raised.value)


@pytest.mark.parametrize("shape", ["{}\n", "[{}]"])
def test_a_long_row_is_parsed_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """If the window grew by a constant number of bytes, the row would be scanned a thousand times."""
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 100)
    row = {"id": "x" * 100_000}
    path = write(tmp_path / "rows.json", shape.replace("{}", json.dumps(row)))
    more, steps = json_rows.TextWindow.read_more, []

    def counted(text: json_rows.TextWindow) -> bool:
        steps.append(len(text.window))
        return more(text)

    monkeypatch.setattr(json_rows.TextWindow, "read_more", counted)
    assert list(read_rows(path)) == [row]
    assert sum(steps) < 10 * 100_000


def strings(*values: bytes) -> pa.Array:
    """Return a string array of arbitrary bytes. Files can contain them, because pyarrow does not validate UTF-8."""
    packed = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(packed), packed.buffers())


def test_invalid_utf_8_in_parquet_is_replaced_in_every_column_type(tmp_path: Path) -> None:
    conversation = pa.StructArray.from_arrays(
        [strings(b"human", b"gpt", b"human"), strings(b"Q\xff", b"\xc3\xbc", b"Q")], ["from", "value"]
    )
    table = pa.table(
        {
            "id": strings(b"a\xfe", b"b"),
            "conversations": pa.ListArray.from_arrays([0, 2, 3], conversation),
            "kind": strings(b"k\xff", b"k").dictionary_encode(),
            "score": [0.5, None],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    turns = [{"from": "human", "value": "Q\ufffd"}, {"from": "gpt", "value": "ü"}]
    assert list(read_rows(tmp_path / "rows.parquet")) == [
        {"id": "a\ufffd", "conversations": turns, "kind": "k\ufffd", "score": 0.5},
        {"id": "b", "conversations": [{"from": "human", "value": "Q"}], "kind": "k", "score": None},
    ]


def test_a_zstd_file_with_a_skippable_first_frame_is_read(tmp_path: Path) -> None:
    """The compressor pzstd writes such files."""
    skippable = struct.pack("<II", 0x184D2A5C, 4) + b"size"
    path = tmp_path / "rows.json.zst"
    path.write_bytes(skippable + pa.compress(json.dumps(ROWS).encode(), codec="zstd", asbytes=True))
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_parquet_file_inside_a_compressed_file_is_a_user_error(tmp_path: Path, codec: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"]}), buffer)
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / "rows"), "wb"), codec) as stream:
        stream.write(buffer.getvalue())
    with pytest.raises(
        UserError, match=r"is a Parquet file inside a compressed file, expected a JSON array .*\. Unpack it"
    ):
        list(read_rows(tmp_path / "rows"))


def test_a_zip_file_given_as_annotations_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.json is a zip file, expected a JSON array .*\. Unpack it"):
        list(read_rows(write(tmp_path / "rows.json", "PK\3\4...")))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_ANNOTATIONS = {
    "Git LFS pointer": (POINTER, "is a Git LFS pointer, expected a JSON array", "git lfs pull"),
    "git-annex pointer": (b"../.git/annex/objects/x/y", "is a git-annex pointer, expected", "git annex get"),
    "UTF-16 with a mark": (json.dumps(ROWS).encode("utf-16"), "is UTF-16 text, expected", "Convert it to UTF-8"),
    "UTF-16 LE without a mark": (json.dumps(ROWS).encode("utf-16-le"), "is UTF-16 text, expected", "Convert"),
    "UTF-16 BE without a mark": (json.dumps(ROWS).encode("utf-16-be"), "is UTF-16 text, expected", "Convert"),
    "UTF-32": (json.dumps(ROWS).encode("utf-32"), "is UTF-32 text, expected", "Convert"),
    "HTML": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML or XML page, expected", "Download it"),
    "XML": (b'<?xml version="1.0"?><Error/>', "is an HTML or XML page, expected", "Download it again"),
    "compressed HTML": (gzip.compress(b"<html>"), "is an HTML or XML page inside a compressed file", "Download it"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"[]")), "is a gzip file inside a compressed file", "Unpack it"),
    "bzip2": (bz2.compress(b"[]"), "is a bzip2 file, expected", "Unpack it"),
    "xz": (lzma.compress(b"[]"), "is an xz file, expected", "Unpack it"),
    "compress": (b"\x1f\x9d\x90[]", "is a compressed .Z file, expected", "Unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z file, expected", "Unpack it"),
    "tar": (b"rows.json".ljust(257, b"\0") + b"ustar\0", "is a tar file, expected", "Unpack it"),
    "tar in gzip": (
        gzip.compress(b"rows.json".ljust(257, b"\0") + b"ustar\0"),
        "is a tar file inside a compressed file",
        "Unpack it",
    ),
}


@pytest.mark.parametrize("kind", NOT_ANNOTATIONS)
def test_the_error_for_a_file_of_another_kind_names_what_was_found(tmp_path: Path, kind: str) -> None:
    data, found, remedy = NOT_ANNOTATIONS[kind]
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(UserError) as raised:
        list(read_rows(tmp_path / "rows.json"))
    assert f"rows.json {found}" in str(raised.value)
    assert remedy in str(raised.value).rpartition(". ")[2]


def test_a_folder_given_as_annotations_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, expected a file of rows"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.json.zst", "rows.parquet"])
def test_a_truncated_annotation_file_is_a_user_error(tmp_path: Path, name: str) -> None:
    path = files_of_every_format(tmp_path).get(
        {"rows.json.gz": "gzip", "rows.json.zst": "zstd"}.get(name, ""), tmp_path / name
    )
    if name == "rows.parquet":
        pq.write_table(pa.table({"id": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="Download it again"):
        list(read_rows(path))


def test_reading_a_large_array_keeps_only_a_small_window_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is about 50 times as large as the window of text in memory."""
    row = json.dumps({"id": "x" * 1000})
    path = write(tmp_path / "rows.json", "[" + ",".join([row] * 50_000) + "]")
    windows = recorded_windows(monkeypatch)
    longest = max(len(windows[0].window) for _ in read_rows(path))
    assert longest < 3 * json_rows.CHUNK_BYTES


class FailingFile(io.FileIO):
    """A file whose first reads succeed, and whose later reads raise `error`, with or without an errno."""

    def __init__(self, path: Path, error: Exception, reads: int) -> None:
        super().__init__(path)
        self.error, self.left = error, reads

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), OSError("reset by peer"), RuntimeError("HTTP 503")]
)
@pytest.mark.parametrize("file_format", ["array", "lines", "gzip", "zstd", "parquet"])
def test_a_read_error_is_reported_as_a_disk_failure_and_not_as_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, error: Exception
) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "rows.parquet")
    path = files_of_every_format(tmp_path).get(file_format, tmp_path / "rows.parquet")

    monkeypatch.setattr(Path, "open", lambda path, mode: FailingFile(path, error, 1))
    with pytest.raises(UserError) as raised:
        list(read_rows(path))
    assert str(raised.value) == f"{path} could not be read ({error}). The disk or the network failed: try again"
