"""The manifest of a checkpoint: the identity of the run that saved it, and the size and sha256 of every file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from pipeline.checkpoint.folder import MANIFEST, DamagedCheckpointError
from pipeline.errors import retryable_oserrors
from preprocess.atomic import canonical_json, write_json

CHECKSUM = "seal"  # key of the checksum in manifest.json


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The settings that must not change between a checkpoint and the run that resumes from it."""

    recipe: dict[str, Any]
    fingerprint: str
    shards_sha256: str
    total_steps: int

    def must_match(self) -> dict[str, Any]:
        """Return the manifest entries that must be equal for resuming, in addition to the recipe's fingerprint."""
        return {"shards_sha256": self.shards_sha256, "total_steps": self.total_steps}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, manifest | {CHECKSUM: manifest_checksum(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and verify its checksum. Return the manifest without the checksum.

    Raises: DamagedCheckpointError if the manifest is missing or does not match its checksum; RetryableError if the
    file system fails.
    """
    try:
        with retryable_oserrors(folder):
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest.pop(CHECKSUM) != manifest_checksum(manifest):
            raise ValueError("its checksum does not match")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"no readable {MANIFEST}: {error!r}") from None
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest, which must not contain its checksum."""
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def check_identity(folder: Path, manifest: dict[str, Any], identity: Identity) -> None:
    """Raise UserError if the checkpoint was saved by a run with another identity."""
    if manifest["fingerprint"] != identity.fingerprint:
        changes = _differences(manifest["recipe"], identity.recipe)
        raise UserError(
            f"{folder} was saved with other settings: {'; '.join(changes)}; "
            f"use the old settings, or another run.dir to start a new run"
        )
    for key, value in identity.must_match().items():
        if manifest[key] != value:
            raise UserError(
                f"{folder}: {key} is {manifest[key]}, but this run has {value}; use the same {key}, "
                f"or another run.dir to start a new run"
            )


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Describe each setting that differs between two recipes.

    A setting that one recipe lacks did not exist yet when that recipe was saved, so its default applied.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key, "its default"), new.get(key, "its default"), f"{where}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{path}.")
        elif before != after:
            lines.append(f"{path} was {before}, now {after}")
    return lines
