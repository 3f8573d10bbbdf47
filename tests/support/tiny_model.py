"""An exported model with the tiny preset, random weights and a byte-level tokenizer."""

from pathlib import Path

import torch

from model.emma import Emma
from model.presets import preset
from model.vision import Towers
from model.weights import save_model
from tests.support.tiny_data import write_byte_tokenizer


def save_tiny_model(folder: Path) -> Path:
    """Save the model, as pipeline.export does, and return its folder."""
    tokenizer = write_byte_tokenizer(folder.with_name(f"{folder.name}-tokenizer")) / "tokenizer.json"
    config = preset("tiny_v2")
    torch.manual_seed(0)
    save_model(
        folder,
        config=config,
        state=Emma(config).state_dict(),
        towers=Towers(config.vision),
        tokenizer_json=tokenizer.read_text(),
        extra={},
    )
    return folder
