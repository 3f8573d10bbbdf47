"""The JSON file of measured rows, which is written again after each row, so that a second call can continue."""

from __future__ import annotations

import json
import platform
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from pipeline.latency.measure import Case
from preprocess.atomic import write_json

PACKAGES = ("torch", "triton", "transformers", "timm", "mamba_ssm")
Row = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the rows of one table have in common: the card and the versions of the packages."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {"card": card, "versions": {package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Results:
    """Rows of a JSON file. Each row holds its environment, so one file can hold the rows of several cards.

    Raises: UserError if the file exists but does not hold rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            environments = [row["environment"] for row in self.rows]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of latency rows ({error!r}). Give another --json file") from None
        self.latest = environments[-1] if environments else None

    def holds(self, case: Case, environment: dict[str, Any]) -> bool:
        """Return whether the case was measured in this environment. A row with an error is measured again."""
        return any(_key(row) == (case, environment) for row in self.rows if "error" not in row)

    def add(self, row: Row, environment: dict[str, Any]) -> None:
        """Append a row in the place of an earlier row of the same case, and write the file."""
        row = row | {"environment": environment}
        self.rows = [earlier for earlier in self.rows if _key(earlier) != _key(row)] + [row]
        self.latest = environment
        write_json(self.path, self.rows)

    def of(self, environment: dict[str, Any]) -> list[Row]:
        """Return the rows of one environment, in the order in which they were measured."""
        return [row for row in self.rows if row["environment"] == environment]


def _key(row: Row) -> tuple[Case, dict[str, Any]]:
    return Case(**{field.name: row[field.name] for field in fields(Case)}), row["environment"]
