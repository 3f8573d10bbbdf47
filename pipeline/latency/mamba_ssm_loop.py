"""mamba_ssm's own generation loop, timed with the language model alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from model.config import MambaConfig
from pipeline.latency.contender import ALL_TOKENS, PROMPT, TEXT_TOKENS, TOKEN, Mark, bytes_per_step


def mamba_ssm_twin(own: MambaConfig) -> Any:
    """Return mamba_ssm's language model of the same size, with random bf16 weights, on the GPU."""
    from mamba_ssm.models.config_mamba import MambaConfig as PublishedConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    ssm: dict[str, Any] = {"d_state": own.d_state, "d_conv": own.d_conv, "expand": own.expand}
    if own.kind == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": own.head_dim, "ngroups": own.num_groups, "chunk_size": own.chunk_size}
    published = PublishedConfig(
        d_model=own.d_model, n_layer=own.num_layers, vocab_size=own.vocab_size, ssm_cfg=ssm, pad_vocab_size_multiple=8
    )
    return MambaLMHeadModel(published, device="cuda", dtype=torch.bfloat16).requires_grad_(False)


class MambaSsmLoop:
    """mamba_ssm's `generate(cg=True)`, or `cg=False` without the graph. The image is a prompt of as many tokens.

    mamba_ssm keeps its states in the type of the weights, which is bf16.
    """

    def __init__(self, model: Any, config: MambaConfig, *, image_tokens: int, batch: int, tokens: int, graph: bool):
        from mamba_ssm.utils.generation import update_graph_cache

        self.model, self.graph = model, graph
        self.prompt_tokens = image_tokens + TEXT_TOKENS
        self.prompt = torch.randint(config.vocab_size, (batch, self.prompt_tokens), device="cuda")
        self.bytes_per_step = bytes_per_step(model, config, batch, torch.bfloat16)
        # `generate` keeps this cache, whose graph it would otherwise capture during the first timed run.
        length = self.prompt_tokens + tokens
        cache = update_graph_cache(model, None, batch, self.prompt_tokens, length) if graph else None
        model._decoding_cache = cache

    def answer(self, tokens: int, mark: Mark) -> None:
        phases = itertools.chain([PROMPT], itertools.repeat(TOKEN))
        # The model is called for the prompt, and without the graph also for each token.
        hook = self.model.register_forward_hook(lambda *_: mark(next(phases)))
        try:
            self.model.generate(self.prompt, max_length=self.prompt_tokens + tokens, cg=self.graph)
        finally:
            hook.remove()
        if self.graph:
            mark(ALL_TOKENS)
