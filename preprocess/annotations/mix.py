"""A mix: which annotation files make a shard set, and how its pictures are kept. Read from strict TOML."""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from model.errors import UserError
from preprocess.annotations.dialogue import Format

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Encoding = Literal["jpeg", "raw", "original"]


@dataclass(frozen=True)
class Source:
    """One annotation file.

    annotations     relative to the root of the data; JSON array, JSONL or Parquet, also .gz or .zst
    images          what is put before the rows' picture paths; relative to the root
    expected_rows   of the whole file, whatever the weight; a different number is reported if the limit lets it be known
    limit           only the first so many rows
    weight          how often each row is taken: 3 is three times, 0.5 every second row. The rows that result are
                    what the build counts and numbers
    """

    name: str
    format: Format
    annotations: str
    images: str = ""
    expected_rows: int | None = None
    limit: int | None = None
    weight: float = 1.0

    def times(self, row: int) -> int:
        """How often a row of the file is taken. Over the first n rows that makes ⌊n × weight⌋, evenly spread."""
        return math.floor((row + 1) * self.weight) - math.floor(row * self.weight)


@dataclass(frozen=True)
class Expected:
    """How many rows the files of some sources have together, where only that is published."""

    sources: list[str]
    rows: int


@dataclass(frozen=True)
class Mix:
    """The whole mix. `archives` maps folders of pictures that are not unpacked to the zip or tar of each."""

    sources: tuple[Source, ...]
    expected: tuple[Expected, ...]
    encoding: Encoding
    tokenizer: str | None
    archives: dict[str, str]


def load_mix(path: Path) -> Mix:
    """Raises: UserError that names the file and the key."""
    table = _read_toml(path)
    _refuse_unknown(table, {"tokenizer", "images", "archives", "source", "expected"}, f"{path}")
    pictures = _typed(table, "images", dict, {}, f"{path}")
    _refuse_unknown(pictures, {"encoding"}, f"{path} [images]")
    encoding = pictures.get("encoding", "jpeg")
    _one_of(encoding, get_args(Encoding), f"{path}: images.encoding")
    sources = tuple(_source(row, f"{path} [[source]] {i + 1}") for i, row in enumerate(_tables(table, "source", path)))
    if not sources:
        raise UserError(f"{path} names no source: it needs at least one [[source]] table")
    _refuse_twins([source.name for source in sources], path)
    archives = _typed(table, "archives", dict, {}, f"{path}")
    for folder in archives:
        _typed(archives, folder, str, None, f"{path} [archives]")
    names = {source.name for source in sources}
    rows = [
        _expected(row, names, f"{path} [[expected]] {i + 1}") for i, row in enumerate(_tables(table, "expected", path))
    ]
    return Mix(sources, tuple(rows), encoding, _typed(table, "tokenizer", str, None, f"{path}"), archives)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no mix {path}; the ones that come along are in preprocess/mixes") from None
    except OSError as error:
        raise UserError(f"mix {path} cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def _tables(table: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    """What stands under `[[key]]`."""
    value = table.get(key, [])
    if isinstance(value, dict):
        raise UserError(f"{path}: [{key}] is one table, expected a list of them: write [[{key}]]")
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path}: {key} is {value!r}, expected tables: write each under [[{key}]]")
    return value


_SOURCE_TYPES: dict[str, type | tuple[type, ...]] = {"expected_rows": int, "limit": int, "weight": (int, float)}


def _source(table: dict[str, Any], where: str) -> Source:
    _refuse_unknown(table, {field.name for field in fields(Source)}, where)
    for key in ("name", "format", "annotations"):
        if key not in table:
            raise UserError(f"{where} has no {key!r}")
    for key in table:
        _typed(table, key, _SOURCE_TYPES.get(key, str), None, where)
    _one_of(table["format"], get_args(Format), f"{where}: format")
    if table.get("limit", 1) < 1:
        raise UserError(f"{where}: limit is {table['limit']}; it must be at least 1")
    if not 0 < table.get("weight", 1) < math.inf:
        raise UserError(f"{where}: weight is {table['weight']}; it must be above 0; leave the source out to have none")
    return Source(**table)


def _expected(table: dict[str, Any], names: set[str], where: str) -> Expected:
    _refuse_unknown(table, {"sources", "rows"}, where)
    for key, kind in (("sources", list), ("rows", int)):
        if key not in table:
            raise UserError(f"{where} has no {key!r}")
        _typed(table, key, kind, None, where)
    for name in table["sources"]:
        if not isinstance(name, str) or name not in names:
            raise UserError(f"{where}: there is no source {name!r}; there are {', '.join(sorted(names))}")
    return Expected(**table)


def _refuse_unknown(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in sorted(set(table) - known):
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {nearest[0]!r}? Known" if nearest else "known"
        raise UserError(f"{where} has an unknown key {key!r}; {hint}: {', '.join(sorted(known))}")


def _typed(table: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any, where: str) -> Any:
    value = table.get(key, default)
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: {key} is {value!r}, expected {names}")
    return value


def _one_of(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise UserError(f"{where} is {value!r}, expected one of {', '.join(known)}")


def _refuse_twins(names: list[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} has two sources named {name!r}: the counts are kept by name")
