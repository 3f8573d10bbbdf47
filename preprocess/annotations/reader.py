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
from preprocess.annotations.json_rows import ROW_FORMATS, TextWindow, array_rows, is_array, line_rows
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath

_PARQUET, _GZIP, _ZSTD = b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CONTAINERS = {
    _PARQUET: "a Parquet file",
    _GZIP: "a gzip file",
    _ZSTD: "a zstd file",
    b"PK\3\4": "a zip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zX": "an xz file",
}
_DAMAGE = (EOFError, zlib.error, pa.ArrowInvalid, UnicodeDecodeError, OSError)


def read_rows(path: AnyPath) -> Iterator[Any | Rejected]:
    """Stream the rows of an annotation file, as JSON values. A broken line of JSONL becomes a `Rejected`.

    Raises:
        UserError: If the file is missing or damaged, or if the disk or network fails. A JSON array with a broken row
            counts as damaged, because it is unknown where the next row begins.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} is missing; the mix names it relative to --root")
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


def _rows(file: Any, path: AnyPath) -> Iterator[Any | Rejected]:
    magic = file.read(4)
    file.seek(0)
    if magic == _PARQUET:
        yield from _parquet_rows(file)
        return
    stream = _decompressed(file, magic)
    head = stream.read(4)
    if container := next((name for start, name in _CONTAINERS.items() if head.startswith(start)), None):
        inside = "" if stream is file else " inside a compressed file"
        raise UserError(
            f"{path} is {container}{inside}. Unpack it: expected {ROW_FORMATS}; JSON may be in gzip or zstd"
        )
    text = TextWindow(stream, path, head)
    yield from array_rows(text) if is_array(text) else line_rows(text)


def _decompressed(file: Any, magic: bytes) -> Any:
    if magic.startswith(_GZIP):
        return gzip.open(file)
    skippable_frame = magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50  # pzstd starts files with such a frame
    if magic == _ZSTD or skippable_frame:
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
