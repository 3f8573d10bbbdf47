"""Our models, from a preset with random weights or from an exported folder, run by the inference engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.config import EmmaConfig
from model.emma import Emma
from model.errors import UserError, did_you_mean
from model.presets import PRESETS
from model.vision import Towers
from model.weights import LoadedModel
from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.requests import Request
from pipeline.latency.contender import QUESTION, TEXT_TOKENS, Mark, bytes_per_step
from preprocess.prompts import END_OF_TEXT, Tokenizer, encode_prompt

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


class EngineAnswers:
    """Answers of the inference engine to one batch of requests, each about an image."""

    def __init__(self, own: OwnModel, *, batch: int, state: str, graph: bool) -> None:
        config, llm = own.loaded.config, own.loaded.emma.llm
        self.prompt_tokens = config.vision.num_patches + len(own.prompt)
        self.bytes_per_step = bytes_per_step(llm, config.llm, batch, STATES[state])
        self.engine = InferenceEngine(
            own.loaded, _NEVER_STOPS, max_batch=batch, state_dtype=STATES[state], use_graphs=graph
        )
        noise = np.random.Generator(np.random.Philox(key=1))
        shape = (config.vision.image_px, config.vision.image_px, 3)
        self.images = [noise.integers(0, 256, shape, np.uint8) for _ in range(batch)]
        self.prompt = own.prompt

    def answer(self, tokens: int, mark: Mark) -> None:
        self.engine.mark = mark
        self.engine.complete([Request(prompt=self.prompt, image=image, max_new_tokens=tokens) for image in self.images])


def _tokenizer_that_never_stops() -> Tokenizer:
    """Return a tokenizer whose end-of-text token no model generates. It decodes all tokens to empty text."""
    model = {"type": "WordLevel", "vocab": {END_OF_TEXT[0]: 0}, "unk_token": END_OF_TEXT[0]}
    tokenizer = Tokenizer(json.dumps({"version": "1.0", "model": model}).encode(), "none")
    tokenizer.eos_id = -1
    return tokenizer


_NEVER_STOPS = _tokenizer_that_never_stops()
