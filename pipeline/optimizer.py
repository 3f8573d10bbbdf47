"""AdamW and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.recipe import OptimConfig


def build_optimizer(model: torch.nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices with weight decay, and all other parameters without.

    Norms, biases, embeddings, convolutions and the state-space parameters are not decayed.

    Differs from the paper's published code, which built its groups after sharding had flattened every tensor, so that
    no parameter was decayed. For the same reason, call this function before `deepspeed.initialize`.
    """
    exempt = {
        id(p) for m in model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.Conv1d)) for p in m.parameters()
    }
    decayed, undecayed = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for parameter in model.parameters():
        is_exempt = id(parameter) in exempt or getattr(parameter, "_no_weight_decay", False)
        (decayed if parameter.ndim >= 2 and not is_exempt else undecayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
