"""Strict TOML: read a file, and parse its tables into dataclasses that declare every key, type and range."""

from __future__ import annotations

import math
import sys
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from model.errors import UserError, did_you_mean
from preprocess.file_kinds import HEAD_BYTES, recognise

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, both included. A field declares them as `Annotated[int, Range(least=1)]`."""

    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Key:
    """Key of a field in TOML, if it differs from the field's name: `Annotated[tuple[X, ...], Key("x")]`."""

    name: str


class Unset(Enum):
    """Type of the constant `UNSET`."""

    UNSET = "unset"


UNSET: Any = Unset.UNSET
"""Value of a required key that is absent, if the caller of `parse_table` allows this (`may_be_unset`)."""


def read_toml(path: Path, *, what: str, shipped: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: File to read.
        what: Kind of file for messages, such as "recipe".
        shipped: Folder of such files in this project. The message names it if `path` does not exist.

    Raises: UserError if the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; the ones that ship with the project are in {shipped}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what} ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            kind = recognise(file.read(HEAD_BYTES))
        found = f"{error} (found {kind.name}, expected UTF-8 text)" if kind else error
        raise UserError(f"{path}: not valid TOML: {found}") from None


@dataclass(frozen=True)
class CommandLineValue:
    """Value of `key=value` on the command line. How its text is read depends on the type of the key."""

    text: str

    def parse(self, kind: Any = None) -> Any:
        """Parse the text as TOML, or as None if it is "null". Text that is not TOML stays as it is.

        If a key of type `kind` holds text, only a TOML string is parsed, so that `run.dir=20240501` is not a number.
        """
        if self.text == "null":
            return None
        try:
            value = tomllib.loads(f"value = {self.text}")["value"]
        except tomllib.TOMLDecodeError:
            return self.text
        return self.text if _holds_text(kind) and not isinstance(value, str) else value


def parse_table(
    kind: type[T],
    table: Mapping[str, Any],
    where: str,
    *,
    may_be_unset: Collection[str] = (),
    how_to_set: str = "set it in this file",
) -> T:
    """Parse a table into a dataclass. Nested tables are parsed into the dataclasses of the fields.

    Args:
        kind: Dataclass whose fields are the valid keys.
        table: Table, as `read_toml` returns it.
        where: Name of the file for messages.
        may_be_unset: Dotted names of required keys that become `UNSET` if they are absent.
        how_to_set: Advice about an absent required key; `{key}` stands for its name.

    Raises: UserError that names the key, what was found and what is valid.
    """
    parser = _Parser(may_be_unset=frozenset(may_be_unset), how_to_set=how_to_set)
    parsed = parser.table(kind, table, where, prefix="")
    if parser.absent:  # reported last, because a misspelt key explains more
        raise UserError(parser.absent[0])
    return parsed


@dataclass(frozen=True, kw_only=True)
class _Parser:
    """Recursive parser of one call of `parse_table`, with the options of this call."""

    may_be_unset: frozenset[str]
    how_to_set: str
    absent: list[str] = field(default_factory=list)  # messages about required keys that are not set

    def table(self, kind: type[T], table: Mapping[str, Any], where: str, *, prefix: str) -> T:
        """Parse one table. `prefix` is the dotted prefix of its keys in messages."""
        hints = typing.get_type_hints(kind, include_extras=True)
        known = {_key(hints[each.name], each.name): each for each in fields(typing.cast(Any, kind))}
        for key in table:
            if key not in known:
                hint = did_you_mean(prefix + key, [prefix + valid for valid in known])
                raise UserError(
                    f"{where}: unknown key {prefix + key!r}{hint}; valid keys here: {', '.join(sorted(known))}"
                )
        values = {}
        for key, each in known.items():
            name, hint = prefix + key, hints[each.name]
            if key in table:
                values[each.name] = self.value(hint, table[key], where, name)
            elif _is_required(each):
                values[each.name] = self._absent(hint, where, name)
        return kind(**values)

    def _absent(self, hint: Any, where: str, name: str) -> Any:
        if is_dataclass(hint):
            return self.table(typing.cast(type, hint), {}, where, prefix=f"{name}.")
        if name not in self.may_be_unset:
            self.absent.append(f"{where}: {name} is not set; {self.how_to_set.format(key=name)}")
        return UNSET

    def value(self, hint: Any, value: Any, where: str, name: str) -> Any:
        """Check one value against the type of its field, and convert integers to floats and lists to tuples."""
        kind, *constraints = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if isinstance(value, CommandLineValue):
            value = value.parse(kind)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if is_dataclass(kind) or origin is dict:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name}: found {value!r}, expected a table of keys")
            if origin is dict:
                return {key: self.value(arguments[1], each, where, f"{name}.{key}") for key, each in value.items()}
            return self.table(typing.cast(type, kind), value, where, prefix=f"{name}.")
        if origin is tuple and is_dataclass(arguments[0]):
            rows = _rows(value, where, name)
            row_kind = typing.cast(type, arguments[0])
            return tuple(self.table(row_kind, row, f"{where}: [[{name}]] {i}", prefix="") for i, row in rows)
        value = _converted(kind, value)
        if not _fits(kind, value):
            found = list(value) if isinstance(value, tuple) else value  # as it is written in TOML
            quotes = "" if isinstance(found, str | list | dict | None) or not _holds_text(kind) else ", in quotes"
            raise UserError(f"{where}: {name}: found {found!r}, expected {_describe(kind)}{quotes}")
        for constraint in constraints:
            if isinstance(constraint, Range):
                _check_range(constraint, value, where, name)
        return value


def _key(hint: Any, field_name: str) -> str:
    extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((extra.name for extra in extras if isinstance(extra, Key)), field_name)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _holds_text(kind: Any) -> bool:
    """Return whether values of this type are text, such as `str`, `str | None` and `Literal["auto", "cpu"]`."""
    if typing.get_origin(kind) is Literal:
        return all(isinstance(option, str) for option in typing.get_args(kind))
    return kind is str or (_is_union(kind) and any(map(_holds_text, typing.get_args(kind))))


def _rows(value: Any, where: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Check that a value is a list of tables. Return the tables with their numbers, which start at 1."""
    if isinstance(value, dict):
        raise UserError(f"{where}: [{name}] is one table, expected a list of tables: write [[{name}]]")
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{where}: {name}: found {value!r}, expected tables: write each under [[{name}]]")
    return list(enumerate(value, 1))


def _converted(kind: Any, value: Any) -> Any:
    """Convert an integer to a float, or a list to a tuple, if the type requires this."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(map(_converted, kinds, value)) if len(kinds) == len(value) else tuple(value)
    wants_float = kind is float or (_is_union(kind) and float in arguments)
    return float(value) if wants_float and isinstance(value, int) and not isinstance(value, bool) else value


def _fits(kind: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(_fits, kinds, value))
    if _is_union(kind):
        return any(_fits(option, value) for option in arguments)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        number = "" if arguments[1:] == (...,) else f"{len(arguments)} "
        return f"a list of {number}{_describe(arguments[0])}"
    if _is_union(kind):
        return " or ".join(_describe(option) for option in arguments if option is not type(None))
    return kind.__name__


def _check_range(bounds: Range, value: Any, where: str, name: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not bounds.least <= number <= bounds.most:
            upper = f" and at most {bounds.most:g}" if bounds.most < math.inf else ""
            raise UserError(f"{where}: {name}: found {number}, expected at least {bounds.least:g}{upper}")
