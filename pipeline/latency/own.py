"""Our models, from a preset with random weights or from an exported folder, run by the inference engine's parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError, did_you_mean
from model.presets import PRESETS
from model.vision import Towers
from model.weights import LoadedModel
from pipeline.inference.engine import load
from pipeline.latency.contender import IMAGE, PROMPT, QUESTION, TEXT_TOKENS, TOKEN, Mark, bytes_per_step, random_images
from preprocess.prompts import encode_prompt

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_PREFILL_GRAPH = 8  # largest batch whose prefill waits for Python without a graph


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A model with the token ids of its prompt."""

    loaded: LoadedModel
    prompt: list[int]


def open_model(name: str, device: torch.device) -> OwnModel:
    """Load an exported folder, or give a preset random weights of the type that `load` chooses.

    A preset needs no tokenizer: its prompt consists of arbitrary token ids, because the time does not depend on them.

    Raises: UserError if there is neither such a folder nor such a preset.
    """
    if Path(name).is_dir():
        loaded, tokenizer = load(name, device.type)
        question = [{"from": "human", "value": QUESTION}]
        return OwnModel(loaded=loaded, prompt=encode_prompt(question, loaded.config.template, tokenizer))
    if name not in PRESETS:
        raise UserError(f"{name}: neither an exported folder nor a preset{did_you_mean(name, PRESETS)}")
    return OwnModel(loaded=random_model(PRESETS[name], device), prompt=list(range(1, TEXT_TOKENS + 1)))


def random_model(config: EmmaConfig, device: torch.device) -> LoadedModel:
    """Return a preset with random weights, allocated on the device. Like an exported model, it has no alignment."""
    torch.manual_seed(0)
    config = replace(config, alignment=None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        emma, towers = Emma(config).to(dtype), Towers(config.vision).to(dtype)
    emma.requires_grad_(False).eval()
    return LoadedModel(config=config, emma=emma, towers=towers, tokenizer=None, extra={}, device=device)


class OwnParts:
    """Image encoders, prefill and decoding step of our model, for one batch of images with the same question.

    On a GPU, the step runs our kernels, with or without a CUDA graph.
    """

    def __init__(self, own: OwnModel, *, batch: int, state: str, graph: bool) -> None:
        self.emma, self.towers, config = own.loaded.emma, own.loaded.towers, own.loaded.config
        self.pixels = random_images(config.vision, batch, own.loaded.device)
        self.text = torch.tensor([own.prompt] * batch, device=own.loaded.device)
        self.prompt_tokens = config.vision.num_patches + len(own.prompt)
        self.bytes_per_step = bytes_per_step(self.emma.llm, config.llm, batch, STATES[state])
        self.decoder = self.prefill_graph = None
        if own.loaded.device.type == "cuda":
            from model.kernels.decode_graph import DecodeGraph
            from model.kernels.prefill_graph import PrefillGraph

            self.decoder = DecodeGraph(self.emma.llm, batch, state_dtype=STATES[state], graph=graph)
            if graph and batch <= MAX_PREFILL_GRAPH:
                self.prefill_graph = PrefillGraph(self.emma.llm, batch, self.prompt_tokens)

    @torch.no_grad()
    def answer(self, tokens: int, mark: Mark) -> None:
        features = self.towers(self.pixels)
        mark(IMAGE)
        prompt = torch.cat(self.emma.embed(self.text, features), 1)
        logits, cache = (self.prefill_graph or self.emma.llm.prefill)(prompt)
        token = logits.argmax(-1)
        if self.decoder:
            self.decoder.load(cache)
        mark(PROMPT)
        for number in range(tokens - 1):
            if self.decoder:
                self.decoder.step(None if number else token)
            else:
                token = self.emma.llm.decode(token, cache).argmax(-1)
            mark(TOKEN)
