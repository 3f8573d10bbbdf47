"""Layout of exported folders: the configuration and the tensor names of transformers.

The configuration is written without transformers itself, because versions write the same values in different ways. It
has every value that describes the network, because the default values describe another model (Codestral).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import EOS_ID, PAD_ID, EmmaConfig, MambaConfig
from model.errors import UserError
from model.tensors import report_write_errors, save_tensors, write_text
from model.vision import Towers

FORMAT = 2
OURS, THEIRS = "backbone.embedding.", "backbone.embeddings."
CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
TOWERS_FILE = "towers.safetensors"  # only folders of format 1 have it
MODEL_CLASS = "EmmaMambaForConditionalGeneration"


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens in the tokenizer of a model."""

    eos: int = EOS_ID
    """End of text."""

    pad: int = PAD_ID
    """Padding."""

    image: int | None = None
    """The `<image>` token, which stands for one patch in the inputs of transformers."""


def transformers_config(config: MambaConfig, ids: TokenIds) -> dict[str, Any]:
    """Return the values of the transformers configuration that describes the same network as `config`."""
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "num_hidden_layers": config.num_layers,
        "expand": config.expand,
        "conv_kernel": config.d_conv,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "bos_token_id": ids.eos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    if config.kind == "mamba1":
        names = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
        return names | shared | {"time_step_rank": config.dt_rank}
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **shared,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "n_groups": config.num_groups,
        "chunk_size": config.chunk_size,
        # Python writes this as `Infinity`, which every version of transformers reads. Version 5 writes an object
        # instead, which version 4 does not read.
        "time_step_limit": [0.0, float("inf")],
    }


def exported_config(
    config: EmmaConfig, towers: Towers, ids: TokenIds, *, dtype: torch.dtype, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json. transformers reads all keys except `emma`, which `load_model` reads."""
    return {
        "model_type": "emma",
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": "configuration_emma.EmmaConfig",
            "AutoModel": f"modeling_emma.{MODEL_CLASS}",
            "AutoModelForImageTextToText": f"modeling_emma.{MODEL_CLASS}",
        },
        "dtype": dtype_name(dtype),
        "tie_word_embeddings": True,
        "bos_token_id": ids.eos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "image_token_id": ids.image,
        "cross_scan": config.cross_scan,
        "towers": [tower.description() for tower in towers.towers.values()],
        "text_config": transformers_config(config.llm, ids),
        "emma": {"format": FORMAT, "model": dataclasses.asdict(config), "extra": dict(extra)},
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def published_name(name: str) -> str:
    """Return the name in an exported file of a tensor of `Emma`, or of `Towers` with the prefix `towers.`."""
    if name.startswith("llm."):
        return "language_model." + name.removeprefix("llm.").replace(OURS, THEIRS)
    return name.replace(".vit.", ".", 1) if name.startswith("towers.") else name


def our_name(published: str) -> str:
    """Invert `published_name`."""
    if published.startswith("language_model."):
        return "llm." + published.removeprefix("language_model.").replace(THEIRS, OURS)
    if published.startswith("towers."):
        _, tower, rest = published.split(".", 2)
        return f"towers.{tower}.vit.{rest}"
    return published


def begin_export(folder: Path, names: Iterable[str]) -> None:
    """Write a config.json that marks the folder as an incomplete export, and delete the weights of an earlier export.

    The complete config.json must be written last.

    Raises: UserError if the folder has a file of these names, or a config.json, that no export wrote.
    """
    if not _is_export(folder / CONFIG_FILE):
        if foreign := [name for name in (CONFIG_FILE, *names) if (folder / name).exists()]:
            raise UserError(
                f"{folder}: found {', '.join(foreign)} of other origin, which the export would replace. "
                "Choose another folder, or move these files."
            )
    else:
        for leftover in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX_FILE, folder / TOWERS_FILE):
            leftover.unlink(missing_ok=True)
    write_text(folder / CONFIG_FILE, json.dumps({"emma": {}}) + "\n")


def _is_export(path: Path) -> bool:
    """Return whether an export wrote this config.json: the whole model in any format, or the language model alone."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and ("emma" in described or described.keys() == {"format", "model", "extra"})


def save_language_model(
    folder: Path,
    config: MambaConfig,
    state: Mapping[str, Tensor],
    *,
    ids: TokenIds,
    dtype: torch.dtype = torch.float32,
    files: Mapping[str, str],
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` reads.

    Args:
        folder: Folder to write.
        config: Configuration of the language model.
        state: State dict of the `MambaLM` module.
        ids: Ids of the special tokens.
        dtype: Type of the saved tensors.
        files: Contents of other files by name.

    Raises: UserError if the folder cannot be written, or if it has files of other origin with the same names.
    """
    tied = "lm_head.weight"  # tied to the embedding
    tensors = {name.replace(OURS, THEIRS): tensor for name, tensor in state.items() if name != tied}
    described = transformers_config(config, ids) | {"dtype": dtype_name(dtype), "emma": {}}
    with report_write_errors(folder):
        begin_export(folder, (MODEL_FILE, *files))
        save_tensors(folder / MODEL_FILE, tensors, dtype)
        for name, text in files.items():
            write_text(folder / name, text)
        write_text(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
