"""Export of the language model in the layout of transformers, for tools that use `AutoModelForCausalLM`.

Only this module imports transformers. It sets every value of the transformers configuration, because the default values
describe another model (Codestral).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from model.config import EOS_ID, PAD_ID, MambaConfig
from model.tensors import report_write_errors

OURS, THEIRS = "backbone.embedding.", "backbone.embeddings."


def transformers_config(config: MambaConfig) -> Any:
    """Return the `MambaConfig` or `Mamba2Config` of transformers that describes the same network as `config`."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "num_hidden_layers": config.num_layers,
        "expand": config.expand,
        "conv_kernel": config.d_conv,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if config.kind == "mamba1":
        return transformers.MambaConfig(**shared, time_step_rank=config.dt_rank, architectures=["MambaForCausalLM"])
    heads = {"num_heads": config.num_heads, "head_dim": config.head_dim, "n_groups": config.num_groups}
    return transformers.Mamba2Config(
        **shared, **heads, chunk_size=config.chunk_size, architectures=["Mamba2ForCausalLM"]
    )


def save_language_model(folder: Path, config: MambaConfig, state: Mapping[str, Tensor]) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` reads.

    Args:
        folder: Folder to write.
        config: Configuration of the language model.
        state: State dict of the `MambaLM` module.

    Raises: UserError if the folder cannot be written.
    """
    tensors = {
        name.replace(OURS, THEIRS): tensor.detach().contiguous()
        for name, tensor in state.items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    with report_write_errors(folder):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        transformers_config(config).save_pretrained(folder)
