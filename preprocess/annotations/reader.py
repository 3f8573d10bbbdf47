"""Annotation file reader, which streams the rows of JSON arrays, JSONL and Parquet files.

JSON files may be compressed with gzip or zstd.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from preprocess import file_kinds
from preprocess.annotations.json_rows import ROW_FORMATS, TextWindow, array_rows, is_array, line_rows
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath

_DAMAGE = (EOFError, zlib.error, pa.ArrowInvalid, UnicodeDecodeError, OSError)


def read_rows(path: AnyPath) -> Iterator[Any | Rejected]:
    """Stream the rows of an annotation file, as JSON values. A broken line of JSONL becomes a `Rejected`.

    Raises:
        UserError: If the file is missing or damaged, or if the disk or network fails. A JSON array with a broken row
            counts as damaged, because it is unknown where the next row begins.
    """
    yield from (row for _, row in rows_with_place(path))


def rows_with_place(path: AnyPath) -> Iterator[tuple[str, Any | Rejected]]:
    """Stream rows as `read_rows` does, each with its place for messages, such as "line 3". Raises: UserError."""
    if not path.is_file():
        raise UserError(f"{path} is a folder, expected a file of rows" if path.is_dir() else f"{path} is missing")
    with path.open("rb") as opened:
        file = _FailureRecorder(opened)
        try:
            yield from _rows(file, path)
        except Exception as error:
            if file.failure:
                message = f"{path} could not be read ({file.failure}). The disk or the network failed: try again"
            elif isinstance(error, _DAMAGE):
                message = f"{path} ends early or is damaged ({error}). Download it again"
            else:
                raise
            raise UserError(message) from None


class _FailureRecorder:
    """A file that records its read errors, because decoders replace them by errors that look like damaged data."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _rows(file: Any, path: AnyPath) -> Iterator[tuple[str, Any | Rejected]]:
    kind = _kind(file.read(file_kinds.HEAD_BYTES))
    file.seek(0)
    if kind == "a Parquet file":
        yield from ((f"row {number}", row) for number, row in enumerate(_parquet_rows(file), 1))
        return
    stream = _decompressed(file, kind)
    head = stream.read(file_kinds.HEAD_BYTES)
    if found := file_kinds.recognise(head):
        inside = "" if stream is file else " inside a compressed file"
        remedy = "unpack it" if inside and found.name == "a Parquet file" else found.remedy
        raise UserError(
            f"{path} is {found.name}{inside}, expected {ROW_FORMATS}; JSON may be in gzip or zstd. "
            f"{remedy[0].upper()}{remedy[1:]}"
        )
    text = TextWindow(stream, path, head)
    yield from ((f"line {line}", row) for line, row in (array_rows(text) if is_array(text) else line_rows(text)))


def _kind(head: bytes) -> str | None:
    kind = file_kinds.recognise(head)
    return kind.name if kind else None


def _decompressed(file: Any, kind: str | None) -> Any:
    if kind == "a gzip file":
        return gzip.open(file)
    if kind == "a zstd file":
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return file


def _parquet_rows(file: Any) -> Iterator[Any]:
    table, read = pq.ParquetFile(file), 0
    for batch in table.iter_batches(batch_size=1024):
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = map(_to_python, batch.to_struct_array())
        yield from values
        read += len(batch)
    if read != table.metadata.num_rows:  # pyarrow does not notice some damaged footers
        raise EOFError(f"its footer declares {table.metadata.num_rows} rows, but it holds {read}")


def _to_python(value: pa.Scalar) -> Any:
    """Convert a Parquet value to a Python value, and replace invalid UTF-8 by U+FFFD, as for JSON files."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: _to_python(item) for name, item in value.items()}
        if isinstance(value, pa.ListScalar):
            return [_to_python(item) for item in value.values]
        if isinstance(value, pa.DictionaryScalar):
            return _to_python(value.value)
        return value.as_buffer().to_pybytes().decode(errors="replace")
