"""Annotation files as a stream of rows: JSON arrays, JSONL and Parquet, plain, gzipped or zstd. Never held whole."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from preprocess.places import Place
from preprocess.rejects import Rejected

CHUNK_BYTES = 1 << 20
LONGEST_ROW_CHARACTERS, LONGEST_NUMBER = 64 << 20, 32
_SPACE = " \t\r\n"


def read_rows(path: Place) -> Iterator[Any | Rejected]:
    """Each row as JSON gave it, or why a line of JSONL could not be read; a row's number is its place in the stream.

    Raises: UserError if there is no such file, or if the rest of it cannot be told apart (a broken array).
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} is missing; the mix names it relative to --root")
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic == b"PAR1":
            yield from _parquet_rows(raw, path)
            return
        text = _Text(_decompressed(raw, magic), path)
        try:
            yield from _array_rows(text) if text.peek() == "[" else _lines(text)
        except (EOFError, zlib.error, pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's, not the archive's
            raise UserError(f"{path} ends early or is damaged ({error}); fetch it again") from None


def _decompressed(raw: IO[bytes], magic: bytes) -> IO[bytes]:
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(raw)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def _parquet_rows(raw: IO[bytes], path: Place) -> Iterator[Any]:
    try:
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file ({error}); fetch it again") from None


class _Text:
    """A window of decoded characters that moves through the file and knows its line. Bad UTF-8 becomes U+FFFD."""

    def __init__(self, stream: IO[bytes], path: Place) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self.window, self.position = "", 0
        self.line, self.line_start = 1, 0  # of `position`; line_start is relative to the window, so it can be negative
        self.ended = False

    def more(self) -> bool:
        """Reads on, forgetting what has been passed; False at the end of the file."""
        if self.ended:
            return False
        data = self.stream.read(CHUNK_BYTES)
        self.ended = not data
        self.window = self.window[self.position :] + self.decoder.decode(data, final=self.ended)
        self.line_start -= self.position
        self.position = 0
        return True

    def advance(self, end: int) -> None:
        newlines = self.window.count("\n", self.position, end)
        if newlines:
            self.line += newlines
            self.line_start = self.window.rindex("\n", self.position, end) + 1
        self.position = end

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file; moves up to it."""
        while True:
            end = self.position
            while end < len(self.window) and self.window[end] in _SPACE:
                end += 1
            self.advance(end)
            if end < len(self.window):
                return self.window[end]
            if not self.more():
                return ""

    def where(self) -> str:
        return f"line {self.line} column {self.position - self.line_start + 1}"


def _array_rows(text: _Text) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text.advance(text.position + 1)
    if text.peek() == "]":
        return
    while True:
        text.peek()
        yield _array_element(decoder, text)
        separator = text.peek()
        if separator not in (",", "]"):
            found = f"found {separator!r}" if separator else "the file ends"
            raise UserError(f"{text.path}, {text.where()}: expected ',' or ']' after a row, {found}; fetch it again")
        text.advance(text.position + 1)
        if separator == "]":
            return


def _array_element(decoder: json.JSONDecoder, text: _Text) -> Any:
    """The value at the window's position; the window grows until the value is whole."""
    while True:
        try:
            row, end = decoder.raw_decode(text.window, text.position)
        except json.JSONDecodeError as error:
            cut_short = error.msg.startswith("Unterminated string") or error.pos > len(text.window) - 16
            small = len(text.window) - text.position < LONGEST_ROW_CHARACTERS
            if cut_short and small and text.more():
                continue
            text.advance(min(error.pos, len(text.window)))
            raise UserError(f"{text.path}, {text.where()}: broken JSON ({error.msg}); fetch it again") from None
        except RecursionError:
            raise UserError(f"{text.path}, {text.where()}: broken JSON (nested too deeply)") from None
        if isinstance(row, int | float) and end > len(text.window) - LONGEST_NUMBER and text.more():
            continue  # it could go on
        text.advance(end)
        return row


def _lines(text: _Text) -> Iterator[Any | Rejected]:
    while text.peek():
        end = text.window.find("\n", text.position)
        while end < 0 and text.more():
            end = text.window.find("\n", text.position)
        end = end if end >= 0 else len(text.window)
        line = text.window[text.position : end]
        yield _parsed_line(line, text)
        text.advance(end)


def _parsed_line(line: str, text: _Text) -> Any | Rejected:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Rejected("broken_json", f"line {text.line} column {error.colno}: {error.msg}")
    except RecursionError:
        return Rejected("broken_json", f"line {text.line}: nested too deeply")
