"""Exported tiny models with the GPT-NeoX tokenizer, the values expected of them, and other versions of transformers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.emma import Emma
from model.language_model import MambaLM
from model.presets import preset
from model.transformers_layout import exported_config, published_name, save_language_model
from model.vision import Towers
from model.weights import PUBLISHED_CODE, TIED, LoadedModel, load_model, save_model
from pipeline.publishing.tokenizer_files import language_model_files, model_files, token_ids
from preprocess.images.codec import Pixels, resize_to_square
from preprocess.prompts import Tokenizer, encode_prompt
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import REPOSITORY

STEPS = 22  # teacher-forced decoding steps
ROWS = {"mamba1": 50280, "mamba2": 50288}  # embeddings of the full-size models
TURNS = [
    {"from": "human", "value": "What colour is the car?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": " And the sky, is it blue?\n"},
]


def export_tiny(folder: Path, name: str) -> None:
    """Export a tiny preset with random weights, and with as many embeddings as the GPT-NeoX tokenizer needs."""
    torch.manual_seed(0)
    config = preset(name)
    config = replace(config, llm=replace(config.llm, vocab_size=ROWS[config.llm.kind]), alignment=None)
    emma, towers = Emma(config), Towers(config.vision)
    with torch.no_grad():
        emma.llm.backbone.embedding.weight.normal_(std=0.3)
    files = model_files(gpt_neox(), config)
    save_model(
        folder,
        config=config,
        state=emma.state_dict(),
        towers=towers,
        tokenizer_json=files.pop("tokenizer.json"),
        extra={},
        ids=token_ids(gpt_neox()),
        files=files,
    )


def write_expected(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what this project computes with an exported model, for tests/programs/check_published.py."""
    torch.save(("whole", expected_rows(load_model(folder), tokenizer)), f"{folder}.pt")


def export_shapes(folder: Path, name: str) -> None:
    """Write a folder of a preset without weights, and the shapes that its tensors must have."""
    config = preset(name)
    with torch.device("meta"):
        emma, towers = Emma(config), Towers(config.vision)
    folder.mkdir()
    described = exported_config(config, towers, token_ids(gpt_neox()), dtype=torch.bfloat16, extra={})
    (folder / "config.json").write_text(json.dumps(described))
    for code in PUBLISHED_CODE.glob("*_emma.py"):
        shutil.copy(code, folder)
    tensors = {**emma.state_dict(), **towers.state_dict()}
    kept = {name: tensor for name, tensor in tensors.items() if name != TIED and not name.startswith("alignment.")}
    shapes = {published_name(name): list(tensor.shape) for name, tensor in kept.items()}
    torch.save(("shapes", shapes), f"{folder}.pt")


def export_language_model(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Export the language model of a tiny preset alone, and write what this project computes with it."""
    torch.manual_seed(0)
    config = preset(name)
    llm, ids = MambaLM(config.llm), token_ids(tokenizer)
    files = language_model_files(tokenizer, config)
    save_language_model(folder, config.llm, llm.state_dict(), ids=ids, files=files)
    text = "Which colour is it?"
    tokens = tokenizer.encode(text)
    with torch.no_grad():
        logits = llm.head(llm(llm.embed(torch.tensor([tokens])))[0])
    expected = {"text": text, "ids": tokens, "logits": logits, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    torch.save(("language model", expected), f"{folder}.pt")


def expected_rows(model: LoadedModel, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return three dialogues of different lengths, one of them without an image, with prompts and forced logits."""
    noise = np.random.Generator(np.random.Philox(key=3))
    rows = []
    for turns, shape in ((TURNS[:1], (200, 240, 3)), (TURNS, (90, 70, 3)), (TURNS[:1], None)):
        pixels = noise.integers(0, 256, shape, np.uint8) if shape else None
        prompt = encode_prompt(turns, model.config.template, tokenizer)
        forced = torch.from_numpy(noise.integers(2, 250, STEPS))
        logits = forced_logits(model, prompt, pixels, forced)
        rows.append({"turns": turns, "pixels": pixels, "prompt": prompt, "forced": forced, "logits": logits})
    return rows


@torch.inference_mode()
def forced_logits(
    model: LoadedModel, prompt: list[int], pixels: Pixels | None, forced: torch.Tensor
) -> torch.Tensor:  # [steps, vocab]
    """Return the logits of every step, computed by one forward pass over the whole sequence."""
    features = None
    if pixels is not None:
        square = torch.from_numpy(resize_to_square(pixels, model.config.vision.image_px))
        features = model.towers(square.permute(2, 0, 1)[None])
    tokens = torch.tensor([prompt + forced.tolist()])
    hidden, _ = model.emma.llm(torch.cat(model.emma.embed(tokens, features), 1))
    return model.emma.llm.head(hidden[0, -len(forced) - 1 : -1])


def transformers_version(version: str, cache: Path) -> Path:
    """Install a version of transformers with its dependencies into a folder of its own, unless it is there already."""
    folder = cache / f"transformers-{version}-python{sys.version_info.minor}"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        command += ["--target", str(folder), f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {done.stderr.strip()[-500:]}")
        (folder / "complete").touch()
    return folder


def check_published(
    *folders: Path, scratch: Path, transformers: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests/programs/check_published.py outside the checkout, with a fresh cache of remote code.

    Args:
        folders: Folders to check.
        scratch: Folder for the cache.
        transformers: Folder of a version of transformers; None: the installed version.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub")}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONPATH": str(transformers or "")}
    command = [sys.executable, str(REPOSITORY / "tests/programs/check_published.py"), *map(str, folders)]
    return subprocess.run(
        command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
