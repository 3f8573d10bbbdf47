"""Streaming JSON parser for annotation files: JSON arrays and JSONL, without holding the file in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from model.errors import UserError
from preprocess.rejects import Rejected
from preprocess.remote_path import AnyPath

CHUNK_BYTES = 1 << 20
MAX_FIRST_LINE_CHARACTERS = 1 << 20
MAX_ROW_CHARACTERS = 64 << 20
MAX_NUMBER_CHARACTERS = 32
ROW_FORMATS = "a JSON array of rows, one row per line (JSONL), or Parquet"
_WHITESPACE = " \t\r\n\ufeff"  # files that were joined can have a byte order mark between rows
_NESTED_TOO_DEEPLY, _TOO_MANY_DIGITS = "nested too deeply", "a number has too many digits"


class TextWindow:
    """A window of decoded text that moves through a file and counts its lines. Bad UTF-8 becomes U+FFFD.

    Attributes:
        window: The decoded text that is in memory.
        position: Index in `window` up to which the text has been parsed.
        line: Number of the line that contains `position`, counted from 1.
    """

    def __init__(self, stream: IO[bytes], path: AnyPath, head: bytes) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self.window, self.position = self.decoder.decode(head), 0
        # `line_start` is an index in `window`. It is negative if the line starts before the window.
        self.line, self.line_start = 1, 0
        self.ended = False

    def read_more(self) -> bool:
        """Read the next chunk and drop the parsed text. Return False at the end of the file.

        The chunk is at least as large as the unparsed text, so that the window doubles while a row is incomplete. A
        caller that scans the whole window after each call therefore needs time that is linear in the size of the row.
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
        """Move `position` to `end` and update the line number."""
        newlines = self.window.count("\n", self.position, end)
        if newlines:
            self.line += newlines
            self.line_start = self.window.rindex("\n", self.position, end) + 1
        self.position = end

    def peek(self) -> str:
        """Skip whitespace and return the next character, or "" at the end of the file."""
        while True:
            end = self.position
            while end < len(self.window) and self.window[end] in _WHITESPACE:
                end += 1
            self.advance(end)
            if end < len(self.window):
                return self.window[end]
            if not self.read_more():
                return ""

    def line_end(self, max_characters: int) -> int | None:
        """Return the index of the end of the line, or None if the line goes on for more than `max_characters`."""
        searched = self.position
        while (end := self.window.find("\n", searched)) < 0:
            searched = len(self.window) - self.position  # read_more() drops the parsed text, which shifts all indices
            if searched > max_characters:
                return None
            if not self.read_more():
                return len(self.window)
        return end

    def peek_after(self, end: int) -> str:
        """Return the next character after index `end` that is not whitespace, or "", without moving `position`."""
        while not (rest := self.window[end:].lstrip(_WHITESPACE)):
            end -= self.position
            if not self.read_more():
                return ""
        return rest[0]

    def location(self) -> str:
        return f"{self.path}, line {self.line} column {self.position - self.line_start + 1}"


def is_array(text: TextWindow) -> bool:
    """Return whether the file is one JSON array of rows rather than JSONL.

    If the first line is a complete array, the file could be either. If this array contains no objects and other lines
    follow, the file is treated as JSONL, and its first row is rejected. If it contains objects, the file is treated as
    an array of rows, and the text after the array is reported as an error.
    """
    if text.peek() != "[":
        return False
    if (end := text.line_end(MAX_FIRST_LINE_CHARACTERS)) is None:
        return True
    try:
        first = json.loads(text.window[text.position : end])
    except (ValueError, RecursionError):
        return True
    return not text.peek_after(end) or any(isinstance(row, dict) for row in first)


def array_rows(text: TextWindow) -> Iterator[tuple[int, Any]]:
    """Stream the elements of a JSON array, each with the number of the line that it starts in.

    Raises: UserError with line and column if the JSON is broken.
    """
    decoder = json.JSONDecoder()
    text.advance(text.position + 1)
    if text.peek() != "]":
        yield text.line, _array_element(decoder, text)
        while text.peek() == ",":
            text.advance(text.position + 1)
            text.peek()
            yield text.line, _array_element(decoder, text)
    if (character := text.peek()) != "]":
        raise _unexpected("',' or ']' after a row", character, text)
    text.advance(text.position + 1)
    if character := text.peek():
        raise _unexpected("the end of the file after the array's ']'", character, text)


def _unexpected(expected: str, character: str, text: TextWindow) -> UserError:
    found = repr(character) if character else "the end of the file"
    return UserError(f"{text.location()}: expected {expected}, found {found}. Download the file again")


def _array_element(decoder: json.JSONDecoder, text: TextWindow) -> Any:
    """Parse the value at the current position. Read more of the file until the value is complete."""
    while True:
        try:
            row, end = decoder.raw_decode(text.window, text.position)
        except json.JSONDecodeError as error:
            incomplete = error.msg.startswith("Unterminated string") or error.pos > len(text.window) - 16
            too_long = len(text.window) - text.position >= MAX_ROW_CHARACTERS
            if incomplete and not too_long and text.read_more():
                continue
            if incomplete and too_long:
                raise UserError(f"{text.location()}: a row has more than {MAX_ROW_CHARACTERS} characters") from None
            text.advance(min(error.pos, len(text.window)))
            raise UserError(f"{text.location()}: broken JSON ({error.msg}). Download the file again") from None
        except RecursionError:
            raise UserError(f"{text.location()}: broken JSON ({_NESTED_TOO_DEEPLY})") from None
        except ValueError:
            raise UserError(f"{text.location()}: broken JSON ({_TOO_MANY_DIGITS})") from None
        if isinstance(row, int | float) and end > len(text.window) - MAX_NUMBER_CHARACTERS and text.read_more():
            continue  # the number may have more digits in the next chunk
        text.advance(end)
        return row


def line_rows(text: TextWindow) -> Iterator[tuple[int, Any | Rejected]]:
    """Stream the rows of a JSONL file, each with its line number. A line of broken JSON becomes a `Rejected`.

    Only newlines end a line: JSON strings may contain other line separators of Unicode, such as U+2028.

    Raises: UserError if a line has more than MAX_ROW_CHARACTERS.
    """
    while first := text.peek():
        end = text.line_end(MAX_ROW_CHARACTERS)
        if end is None:
            subject = (
                "the file is a single object" if first == "{" and text.line == 1 else "the line is too long for a row"
            )
            raise UserError(
                f"{text.location()}: {subject} (more than {MAX_ROW_CHARACTERS} characters, expected {ROW_FORMATS}). "
                "Convert the file so that each row stands alone"
            )
        line = text.window[text.position : end]
        yield from ((text.line, row) for row in _parse_lines(line, text.line))
        text.advance(end)


def _parse_lines(line: str, number: int) -> list[Any | Rejected]:
    """Parse a line, which holds several rows if the file's lines end in a carriage return alone."""
    row = _parse_line(line, number)
    if isinstance(row, Rejected) and "\r" in line.rstrip():
        rows = [_parse_line(part, number) for part in line.split("\r") if part.strip(_WHITESPACE)]
        if not any(isinstance(each, Rejected) for each in rows):
            return rows
    return [row]


def _parse_line(line: str, number: int) -> Any | Rejected:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Rejected("broken_json", f"line {number} column {error.colno}: {error.msg}")
    except RecursionError:
        return Rejected("broken_json", f"line {number}: {_NESTED_TOO_DEEPLY}")
    except ValueError:
        return Rejected("broken_json", f"line {number}: {_TOO_MANY_DIGITS}")
