"""Pretrained language models in, trained models in and out."""

from __future__ import annotations

import dataclasses
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
from model.tensors import fill, open_published, open_tensors, writing
from model.vision import Towers

FORMAT = 1
MODEL_FILE, TOWERS_FILE, CONFIG_FILE, TOKENIZER_FILE = (
    "model.safetensors",
    "towers.safetensors",
    "config.json",
    "tokenizer.json",
)
TIED = "llm.lm_head.weight"  # the embedding again: stored once


@dataclass
class LoadedModel:
    """A saved model, ready to answer: frozen, in evaluation mode, on `device`."""

    config: EmmaConfig
    emma: Emma
    towers: Towers
    tokenizer: Path | None
    extra: dict[str, Any]
    device: torch.device


def save_model(
    folder: Path,
    config: EmmaConfig,
    state: Mapping[str, Tensor],
    towers: Towers,
    tokenizer_json: str | None,
    extra: Mapping[str, Any],
) -> None:
    """Writes a folder that `load_model` reads. A state without `alignment.*` makes a model for inference only.

    Raises: UserError if the disk does not take it.
    """
    has_alignment = any(name.startswith("alignment.") for name in state)
    kept = replace(config, alignment=config.alignment if has_alignment else None)
    described = {"format": FORMAT, "model": dataclasses.asdict(kept), "extra": dict(extra)}
    with writing(folder):
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # a folder with a config is complete
        _save_tensors(folder / MODEL_FILE, {name: tensor for name, tensor in state.items() if name != TIED})
        _save_tensors(folder / TOWERS_FILE, towers.state_dict())
        if tokenizer_json is not None:
            _write(folder / TOKENIZER_FILE, tokenizer_json)
        _write(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model of a folder that `save_model` wrote. Raises: UserError if there is none, or a tensor does not fit."""
    described = _read_config(folder)
    config: EmmaConfig = described["model"]
    with torch.device("meta"):
        emma, towers = Emma(config), Towers(config.vision)
    parts: tuple[tuple[nn.Module, str], ...] = ((emma, MODEL_FILE), (towers, TOWERS_FILE))
    for part, name in parts:
        part.to(dtype).to_empty(device=device)
        fill(part, open_tensors(folder / name), str(folder / name), tied={TIED})
        part.requires_grad_(False).eval()
    tokenizer = folder / TOKENIZER_FILE
    return LoadedModel(
        config, emma, towers, tokenizer if tokenizer.exists() else None, described["extra"], torch.device(device)
    )


def load_language_model(emma: Emma, source: str | Path) -> dict[str, Any]:
    """Fills the language model from a folder or hub id, in mamba_ssm's or transformers' layout. On rank 0 only.

    Returns what was loaded: the source, and the sha256 of each file. Raises: UserError.
    """
    folder = Path(source) if Path(source).is_dir() else hub_folder(str(source))
    files = open_published(folder)
    names = {name.replace("backbone.embeddings.", "backbone.embedding."): name for name in files}
    fill(emma.llm, files.renamed(names), str(folder), tied={"lm_head.weight"})
    return {"source": str(source), "sha256": files.record()}


def hub_folder(name: str, cached: bool = False) -> Path:
    """A published language model's folder, downloaded unless it is in the hub's cache already, or must be: `cached`."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    except Exception as error:  # the hub client raises a dozen types; to the user they are one
        raise UserError(
            f"language model {name!r}: neither a folder nor to be had from the hub ({first_line(error)}); "
            "give a folder, or download it on a machine with network first: python -m pipeline.prefetch RECIPE"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        described = json.loads(path.read_text())
        found, described["model"] = described["format"], config_from_dict(described["model"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the description of a saved model ({error!r}); make one with python -m pipeline.export"
        ) from error
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, but this version reads format {FORMAT}; export the run again")
    return described


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    unfinished = path.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
