"""Saving and loading whole models, and loading pretrained language models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import EmmaConfig, config_from_dict
from model.emma import Emma
from model.errors import UserError, first_line
from model.hashing import file_sha256
from model.tensors import load_into, open_published, open_tensors, report_write_errors
from model.vision import Towers

FORMAT = 1
CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
MODEL_FILE, TOWERS_FILE = "model.safetensors", "towers.safetensors"
TIED = "llm.lm_head.weight"  # tied to the embedding, so it is not stored


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
) -> None:
    """Write a folder that `load_model` reads.

    Args:
        folder: Folder to write.
        config: Configuration of the model.
        state: State dict of the `Emma` module. If it has no `alignment.*` tensors, the saved model has no alignment.
        towers: Vision towers.
        tokenizer_json: Content of the tokenizer.json to save; None: no tokenizer is saved.
        extra: Information about the origin of the model, which must be valid JSON.

    Raises: UserError if the folder cannot be written.
    """
    has_alignment = any(name.startswith("alignment.") for name in state)
    kept = replace(config, alignment=config.alignment if has_alignment else None)
    described = {"format": FORMAT, "model": dataclasses.asdict(kept), "extra": dict(extra)}
    with report_write_errors(folder):
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # deleted first and written last: it marks a complete folder
        _save_tensors(folder / MODEL_FILE, {name: tensor for name, tensor in state.items() if name != TIED})
        _save_tensors(folder / TOWERS_FILE, towers.state_dict())
        if tokenizer_json is not None:
            _write(folder / TOKENIZER_FILE, tokenizer_json)
        _write(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model from a folder that `save_model` wrote. Raises: UserError if its files are missing or damaged."""
    described = _read_config(folder)
    config: EmmaConfig = described["model"]
    with torch.device("meta"):
        emma, towers = Emma(config), Towers(config.vision)
    parts: tuple[tuple[nn.Module, str], ...] = ((emma, MODEL_FILE), (towers, TOWERS_FILE))
    for part, name in parts:
        part.to(dtype).to_empty(device=device)
        load_into(part, open_tensors(folder / name), source=str(folder / name), tied={TIED})
        part.requires_grad_(False).eval()
    tokenizer = folder / TOKENIZER_FILE
    return LoadedModel(
        config=config,
        emma=emma,
        towers=towers,
        tokenizer=tokenizer if tokenizer.exists() else None,
        extra=described["extra"],
        device=torch.device(device),
    )


def weights_sha256(folder: str | Path) -> str:
    """Return a sha256 that identifies the weights of an exported folder, for keys of caches and journals.

    If the folder has one weight file, this is the file's sha256, as `sha256sum` prints it. If it has several, this is
    the sha256 of their lines in the format of `sha256sum`, sorted by name. The files are read on every call, because a
    recorded hash would be wrong after another program replaced the weights.

    Raises: UserError if the folder has no weight files.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise UserError(
            f"{folder}: no weight files (*.safetensors). Give a folder that python -m pipeline.export wrote."
        )
    hashes = [file_sha256(path) for path in paths]
    lines = (f"{sha256}  {path.name}\n" for sha256, path in zip(hashes, paths, strict=True))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def load_language_model(emma: Emma, source: str | Path) -> dict[str, Any]:
    """Load pretrained weights into the language model, from a folder or from the hub. Call this on rank 0 only.

    The weight files may have the layout of mamba_ssm or of transformers.

    Returns: `source` and the sha256 of each weight file, to be recorded in the run folder.
    Raises: UserError if the weights cannot be found or do not fit.
    """
    folder = Path(source) if Path(source).is_dir() else hub_folder(str(source))
    files = open_published(folder)
    names = {name.replace("backbone.embeddings.", "backbone.embedding."): name for name in files}
    load_into(emma.llm, files.renamed(names), source=str(folder), tied={"lm_head.weight"})
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
            f"language model {name!r}: not a folder, and cannot be downloaded from the hub ({first_line(error)}); "
            "give a folder, or download it on a machine with network access first: python -m pipeline.prefetch RECIPE"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        described = json.loads(path.read_text())
        format_found, described["model"] = described["format"], config_from_dict(described["model"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the configuration of a saved model ({error!r}); save one with python -m pipeline.export"
        ) from error
    if format_found != FORMAT:
        raise UserError(f"{path}: found format {format_found}, expected {FORMAT}; export the run again")
    return described


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
