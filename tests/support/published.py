"""Exported tiny models with the GPT-NeoX tokenizer, the values expected of them, and other versions of transformers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.emma import Emma
from model.presets import preset
from model.vision import Towers
from model.weights import LoadedModel, load_model, save_model
from pipeline.publishing.tokenizer_files import model_files, token_ids
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


def write_expected(path: Path, folders: list[Path], tokenizer: Tokenizer) -> None:
    """Write what this project computes for three dialogues per folder, for tests/programs/check_published.py."""
    torch.save({folder.name: expected_rows(load_model(folder), tokenizer) for folder in folders}, path)


def expected_rows(model: LoadedModel, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return three dialogues of different lengths, one of them without an image, with prompts and forced logits."""
    size = model.config.vision.image_px
    noise = np.random.Generator(np.random.Philox(key=3))
    rows = []
    for turns, has_image in ((TURNS[:1], True), (TURNS, True), (TURNS[:1], False)):
        pixels = torch.from_numpy(noise.integers(0, 256, (size, size, 3), np.uint8)) if has_image else None
        prompt = encode_prompt(turns, model.config.template, tokenizer)
        forced = torch.from_numpy(noise.integers(2, 250, STEPS))
        logits = forced_logits(model, prompt, pixels, forced)
        rows.append({"turns": turns, "pixels": pixels, "prompt": prompt, "forced": forced, "logits": logits})
    return rows


@torch.inference_mode()
def forced_logits(
    model: LoadedModel, prompt: list[int], pixels: torch.Tensor | None, forced: torch.Tensor
) -> torch.Tensor:  # [steps, vocab]
    """Return the logits of every step, computed by one forward pass over the whole sequence."""
    features = None if pixels is None else model.towers(pixels.permute(2, 0, 1)[None])
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
            reason = f"transformers {version} cannot be installed: {done.stderr.strip()[-500:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        (folder / "complete").touch()
    return folder


def run_without_project(
    program: Path | str, *words: Path, scratch: Path, transformers: Path | None
) -> subprocess.CompletedProcess[str]:
    """Run a program outside the checkout, with a fresh cache of remote code, and with a version of transformers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub")}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONPATH": str(transformers or "")}
    command = [sys.executable, *([str(program)] if isinstance(program, Path) else ["-c", program]), *map(str, words)]
    return subprocess.run(
        command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


CHECK = REPOSITORY / "tests/programs/check_published.py"
