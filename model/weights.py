"""Saving and loading whole models, and loading pretrained language models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import EmmaConfig, config_from_dict
from model.emma import Emma
from model.errors import UserError, hub_error_text, read_error
from model.hashing import weights_sha256 as weights_sha256
from model.tensors import (
    TensorFiles,
    load_into,
    open_published,
    open_tensors,
    report_write_errors,
    save_tensors,
    write_text,
)
from model.transformers_layout import (
    CONFIG_FILE,
    FORMAT,
    MODEL_FILE,
    TOWERS_FILE,
    TokenIds,
    begin_export,
    exported_config,
    our_name,
    published_name,
)
from model.vision import Towers

TOKENIZER_FILE = "tokenizer.json"
TIED = "llm.lm_head.weight"  # tied to the embedding, so it is not stored
PUBLISHED_CODE = Path(__file__).parent / "published"


@dataclass(frozen=True, kw_only=True)
class ExportedFolder:
    """A saved model whose tensors are read only when they are accessed.

    Attributes:
        folder: Path of the folder.
        config: Configuration of the model. It has no alignment if the model was saved without.
        extra: Information about the origin of the model.
        emma: Tensors of `Emma`, by their names in its state dict.
        towers: Tensors of `Towers`, by their names in its state dict.
    """

    folder: Path
    config: EmmaConfig
    extra: dict[str, Any]
    emma: TensorFiles
    towers: TensorFiles

    @property
    def tokenizer(self) -> Path | None:
        """Path of the tokenizer.json, or None if the model was saved without."""
        path = self.folder / TOKENIZER_FILE
        return path if path.exists() else None

    def load_towers(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Towers:
        """Load the vision towers. Raises: UserError if their tensors are missing or do not fit."""
        with torch.device("meta"):
            towers = Towers(self.config.vision)
        towers.to(dtype).to_empty(device=device)
        load_into(towers, self.towers, source=str(self.folder))
        return towers.requires_grad_(False).eval()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A saved model in evaluation mode, without gradients."""

    config: EmmaConfig
    emma: Emma
    towers: Towers
    tokenizer: Path | None
    extra: dict[str, Any]
    device: torch.device


def save_model(
    folder: Path,
    *,
    config: EmmaConfig,
    state: Mapping[str, Tensor],
    towers: Towers,
    tokenizer_json: str | None,
    extra: Mapping[str, Any],
    ids: TokenIds | None = None,
    dtype: torch.dtype = torch.float32,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_model` and transformers read.

    Args:
        folder: Folder to write.
        config: Configuration of the model.
        state: State dict of the `Emma` module. If it has no `alignment.*` tensors, the saved model has no alignment.
        towers: Vision towers.
        tokenizer_json: Content of the tokenizer.json to save; None: no tokenizer is saved.
        extra: Information about the origin of the model, which must be valid JSON.
        ids: Ids of the tokenizer's special tokens; None: those of the GPT-NeoX-20B tokenizer.
        dtype: Type of the saved tensors.
        files: Contents of the other files that transformers needs, by name.

    Raises: UserError if the folder cannot be written, or if it has files of other origin with the same names.
    """
    has_alignment = any(name.startswith("alignment.") for name in state)
    kept = replace(config, alignment=config.alignment if has_alignment else None)
    described = exported_config(kept, towers, ids or TokenIds(), dtype=dtype, extra=extra)
    named = {**state, **towers.state_dict()}
    tensors = {published_name(name): tensor for name, tensor in named.items() if name != TIED}
    texts = {path.name: path.read_text(encoding="utf-8") for path in PUBLISHED_CODE.glob("*_emma.py")}
    texts |= files or {}
    if tokenizer_json is not None:
        texts[TOKENIZER_FILE] = tokenizer_json
    with report_write_errors(folder):
        begin_export(folder, (MODEL_FILE, *texts))
        save_tensors(folder / MODEL_FILE, tensors, dtype)
        for name, text in texts.items():
            write_text(folder / name, text)
        write_text(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")


def open_exported(folder: Path) -> ExportedFolder:
    """Open a folder that `save_model` wrote, in this or the previous format, or that transformers saved again.

    Raises: UserError if its files are missing or damaged.
    """
    described = _read_config(folder)
    config: EmmaConfig = described["model"]
    if described["format"] == 1:
        emma, towers = open_tensors(folder / MODEL_FILE), open_tensors(folder / TOWERS_FILE)
    else:
        files = open_published(folder)
        names = {our_name(name): name for name in files}
        towers = files.renamed({our: name for our, name in names.items() if our.startswith("towers.")})
        emma = files.renamed({our: name for our, name in names.items() if not our.startswith("towers.")})
        if not any(name.startswith("alignment.") for name in emma):
            config = replace(config, alignment=None)  # transformers has dropped the alignment when it saved the model
    return ExportedFolder(folder=folder, config=config, extra=described["extra"], emma=emma, towers=towers)


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model from a folder that `save_model` wrote. Raises: UserError if its files are missing or damaged."""
    exported = open_exported(folder)
    with torch.device("meta"):
        emma = Emma(exported.config)
    emma.to(dtype).to_empty(device=device)
    load_into(emma, exported.emma, source=str(folder), ignore={TIED})
    return LoadedModel(
        config=exported.config,
        emma=emma.requires_grad_(False).eval(),
        towers=exported.load_towers(device, dtype),
        tokenizer=exported.tokenizer,
        extra=exported.extra,
        device=torch.device(device),
    )


def load_language_model(emma: Emma, source: str | Path) -> dict[str, Any]:
    """Load pretrained weights into the language model, from a folder or from the hub. Call this on rank 0 only.

    The weight files may have the layout of mamba_ssm or of transformers.

    Returns: `source` and the sha256 of each weight file, to be recorded in the run folder.
    Raises: UserError if the weights cannot be found or do not fit.
    """
    folder = Path(source) if Path(source).is_dir() else hub_folder(str(source))
    files = open_published(folder)
    names = {name.replace("backbone.embeddings.", "backbone.embedding."): name for name in files}
    load_into(emma.llm, files.renamed(names), source=str(folder), ignore={"lm_head.weight"})
    return {"source": str(source), "sha256": files.file_hashes()}


def hub_folder(name: str, *, cached: bool = False) -> Path:
    """Return the folder of a published language model. Download the model if necessary, unless `cached` is set.

    Raises: UserError if the model is not in the local hub cache and is not or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    except Exception as error:  # the hub client raises exceptions of many types
        raise UserError(
            f"language model {name!r}: not a folder, and cannot be downloaded from the hub ({hub_error_text(error)}); "
            "give a folder, or download it on a machine with network access first: python -m pipeline.prefetch RECIPE"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Return what a config.json says about the model for `load_model`: format, model and extra."""
    path = folder / CONFIG_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("emma", described)  # in format 1, these were the only keys
        found, model = described["format"], config_from_dict(described["model"])
    except PermissionError as error:
        raise read_error(error, path) from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the configuration of a saved model ({error!r}); save one with python -m pipeline.export"
        ) from error
    if found not in (1, FORMAT):
        raise UserError(f"{path}: found format {found}, expected {FORMAT}; export the run again")
    return {"format": found, "model": model, "extra": described["extra"]}
