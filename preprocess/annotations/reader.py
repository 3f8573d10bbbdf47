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
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath

CHUNK_BYTES, FIRST_LINE_CHARACTERS = 1 << 20, 1 << 20
LONGEST_ROW_CHARACTERS, LONGEST_NUMBER = 64 << 20, 32
FORMATS = "a JSON array of rows, one row per line (JSONL), or Parquet"
TOO_MANY_DIGITS = "a number of too many digits"
_SPACE = " \t\r\n"
_PARQUET, _GZIP, _ZSTD = b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PACKED = {_PARQUET: "Parquet", _GZIP: "gzip", _ZSTD: "zstd", b"PK\3\4": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz"}
_DAMAGE = (EOFError, zlib.error, pa.ArrowInvalid, UnicodeDecodeError, OSError)


def read_rows(path: AnyPath) -> Iterator[Any | Rejected]:
    """Each row as JSON gave it, or why a line of JSONL could not be read; a row's number is its place in the stream.

    Raises: UserError if there is no such file, or if the rest of it cannot be told apart (a broken array).
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} is missing; the mix names it relative to --root")
    with path.open("rb") as opened:
        file = _Watched(opened)
        try:
            yield from _rows(file, path)
        except Exception as error:
            if file.failure:
                told = f"{path} could not be read ({file.failure}): its disk or the network failed; try again"
            elif isinstance(error, _DAMAGE):
                told = f"{path} ends early or is damaged ({error}); fetch it again"
            else:
                raise
            raise UserError(told) from None


class _Watched:
    """A file that remembers its own failure: what decoders make of it looks like damage, and some have no errno."""

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
    if packed := next((name for start, name in _PACKED.items() if head.startswith(start)), None):
        within = "" if stream is file else ", compressed once more"
        raise UserError(
            f"{path} is {packed}{within}; unpack it: expected {FORMATS}, the former two also in gzip or zstd"
        )
    text = _Text(stream, path, head)
    yield from _array_rows(text) if _is_array(text) else _lines(text)


def _decompressed(file: Any, magic: bytes) -> Any:
    if magic.startswith(_GZIP):
        return gzip.open(file)
    skippable = magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50  # pzstd's files begin with such a frame
    if magic == _ZSTD or skippable:
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return file


def _parquet_rows(file: Any) -> Iterator[Any]:
    table, read = pq.ParquetFile(file), 0
    for batch in table.iter_batches(batch_size=1024):
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = map(_repaired, batch.to_struct_array())
        yield from values
        read += len(batch)
    if read != table.metadata.num_rows:
        raise EOFError(f"it tells of {table.metadata.num_rows} rows and holds {read}")


def _repaired(value: pa.Scalar) -> Any:
    """Bad UTF-8 becomes U+FFFD, as it does in JSON."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: _repaired(one) for name, one in value.items()}
        if isinstance(value, pa.ListScalar):
            return [_repaired(one) for one in value.values]
        if isinstance(value, pa.DictionaryScalar):
            return _repaired(value.value)
        return value.as_buffer().to_pybytes().decode(errors="replace")


class _Text:
    """A window of decoded characters that moves through the file and knows its line. Bad UTF-8 becomes U+FFFD."""

    def __init__(self, stream: IO[bytes], path: AnyPath, head: bytes) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self.window, self.position = self.decoder.decode(head), 0
        self.line, self.line_start = 1, 0  # of `position`; line_start is relative to the window, so it can be negative
        self.ended = False

    def more(self) -> bool:
        """Reads on, forgetting what has been passed; False at the end of the file.

        A window that was not enough is doubled: whoever looks at all of it each time takes no more than linear time.
        """
        if self.ended:
            return False
        data = self.stream.read(max(CHUNK_BYTES, len(self.window) - self.position))
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

    def line_end(self, most: int) -> int | None:
        """Where in the window the position's line ends; None if that is more than `most` characters away."""
        searched = self.position
        while (end := self.window.find("\n", searched)) < 0:
            searched = len(self.window) - self.position  # there it will be after more()
            if searched > most:
                return None
            if not self.more():
                return len(self.window)
        return end

    def next_after(self, end: int) -> str:
        """As `peek`, from a later place in the window and without moving there."""
        while not (rest := self.window[end:].lstrip(_SPACE)):
            end -= self.position
            if not self.more():
                return ""
        return rest[0]

    def where(self) -> str:
        return f"line {self.line} column {self.position - self.line_start + 1}"


def _is_array(text: _Text) -> bool:
    """Whether "[" opens the array of all rows; it may also be a row of JSONL, which ends with its line, before others.

    With objects in it, it is the rows of a file to which something was appended.
    """
    if text.peek() != "[":
        return False
    if (end := text.line_end(FIRST_LINE_CHARACTERS)) is None:
        return True
    try:
        first = json.loads(text.window[text.position : end])
    except (ValueError, RecursionError):
        return True
    return not text.next_after(end) or any(isinstance(row, dict) for row in first)


def _array_rows(text: _Text) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text.advance(text.position + 1)
    if text.peek() != "]":
        yield _array_element(decoder, text)
        while text.peek() == ",":
            text.advance(text.position + 1)
            text.peek()
            yield _array_element(decoder, text)
    if (found := text.peek()) != "]":
        raise _unexpected("',' or ']' after a row", found, text)
    text.advance(text.position + 1)
    if found := text.peek():
        raise _unexpected("the end of the file after the array's ']'", found, text)


def _unexpected(expected: str, found: str, text: _Text) -> UserError:
    said = f"found {found!r}" if found else "the file ends"
    return UserError(f"{text.path}, {text.where()}: expected {expected}, {said}; fetch it again")


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
            if cut_short and not small:
                raise UserError(
                    f"{text.path}, {text.where()}: a row of over {LONGEST_ROW_CHARACTERS} characters"
                ) from None
            text.advance(min(error.pos, len(text.window)))
            raise UserError(f"{text.path}, {text.where()}: broken JSON ({error.msg}); fetch it again") from None
        except RecursionError:
            raise UserError(f"{text.path}, {text.where()}: broken JSON (nested too deeply)") from None
        except ValueError:
            raise UserError(f"{text.path}, {text.where()}: broken JSON ({TOO_MANY_DIGITS})") from None
        if isinstance(row, int | float) and end > len(text.window) - LONGEST_NUMBER and text.more():
            continue  # it could go on
        text.advance(end)
        return row


def _lines(text: _Text) -> Iterator[Any | Rejected]:
    while begins := text.peek():
        end = text.line_end(LONGEST_ROW_CHARACTERS)
        if end is None:
            found = "the file is one object" if begins == "{" and text.line == 1 else "the line is no row"
            raise UserError(
                f"{text.path}, {text.where()}: {found}, for it has more than {LONGEST_ROW_CHARACTERS} characters; "
                f"expected {FORMATS}: take the rows out of it"
            )
        yield _parsed_line(text.window[text.position : end], text)
        text.advance(end)


def _parsed_line(line: str, text: _Text) -> Any | Rejected:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Rejected("broken_json", f"line {text.line} column {error.colno}: {error.msg}")
    except RecursionError:
        return Rejected("broken_json", f"line {text.line}: nested too deeply")
    except ValueError:
        return Rejected("broken_json", f"line {text.line}: {TOO_MANY_DIGITS}")
