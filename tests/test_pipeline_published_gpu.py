"""An exported model of full size in transformers on a GPU: greedy tokens in fp32, and logits in bf16.

python -m pytest tests/test_pipeline_published_gpu.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.emma import Emma
from model.presets import preset
from model.vision import Towers
from model.weights import load_model, save_model
from pipeline.inference.engine import InferenceEngine
from pipeline.publishing.tokenizer_files import model_files, token_ids
from preprocess.prompts import load_tokenizer
from tests.support.golden_tokenizer import gpt_neox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # transformers and the kernel packages call deprecated functions
]

QUESTION = "What colour is the car?"
NEW_TOKENS = 16


def export_random(folder: Path, name: str, device: str) -> None:
    """Export a model with random weights in bf16. Its embeddings are large, so that no two logits are nearly equal."""
    config = replace(preset(name), alignment=None)
    torch.manual_seed(0)
    with torch.device(device):
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
        dtype=torch.bfloat16,
        files=files,
    )


def ask_engine(folder: Path, pixels: Any, device: str, dtype: torch.dtype) -> tuple[list[int], Tensor]:
    """Return this project's greedy tokens, and its logits after the prompt."""
    model, tokenizer = load_model(folder, device, dtype), load_tokenizer(folder)
    engine = InferenceEngine(model, tokenizer, max_batch=1)
    request = engine.request(QUESTION, pixels, max_new_tokens=NEW_TOKENS)
    [completion] = engine.complete([request])
    features = model.towers(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device))
    logits, _ = model.emma.prefill(torch.tensor([request.prompt], device=device), features)
    return completion.tokens, logits[0].float()


def ask_transformers(folder: Path, pixels: Any, device: str, dtype: torch.dtype) -> tuple[list[int], Tensor]:
    """Return the greedy tokens of transformers, and its logits after the prompt."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt").to(device)
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True, do_sample=False
    )
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), output.logits[0][0].float()


def compare(folder: Path, name: str, device: str) -> None:
    export_random(folder, name, device)
    size = preset(name).vision.image_px
    pixels = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (size, size, 3), np.uint8)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        ours, our_logits = ask_engine(folder, pixels, device, dtype)
        theirs, their_logits = ask_transformers(folder, pixels, device, dtype)
        distance = (our_logits - their_logits).norm() / our_logits.norm()
        assert distance <= tolerance, (
            f"{dtype}: relative distance of the logits {distance:.1e}, allowed {tolerance:.0e}"
        )
        if dtype == torch.float32:
            assert theirs[: len(ours)] == ours
            assert len(ours) == NEW_TOKENS or theirs[len(ours)] == gpt_neox().eos_id


def test_a_full_size_model_answers_in_transformers_as_in_this_project(tmp_path):
    compare(tmp_path / "model", "emma_v2", "cuda")
