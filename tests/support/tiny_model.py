"""An exported model with the tiny preset, random weights and a byte-level tokenizer, and images to ask about."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.emma import Emma
from model.presets import preset
from model.vision import Towers
from model.weights import save_model
from tests.support.tiny_data import write_byte_tokenizer


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Save the model, as pipeline.export does, and return its folder."""
    tokenizer = write_byte_tokenizer(folder.with_name(f"{folder.name}_tokenizer")) / "tokenizer.json"
    config = preset("tiny_v2")
    torch.manual_seed(seed)
    save_model(
        folder,
        config=config,
        state=Emma(config).state_dict(),
        towers=Towers(config.vision),
        tokenizer_json=tokenizer.read_text(),
        extra={},
    )
    return folder


def write_images(folder: Path) -> Path:
    """Write the noise images a.png, b.png and c.png."""
    noise = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(noise.integers(0, 255, (90, 120, 3), np.uint8)).save(folder / f"{name}.png")
    return folder
