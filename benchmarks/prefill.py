"""Prefill benchmark: milliseconds of the model's prefill, of the same prefill as a CUDA graph, and of mamba_ssm's.

    python -m benchmarks.prefill --json prefill.json           # on a machine with one GPU; minutes

The models are full-size language models with random bf16 weights. The prompt has 749 positions, which is an image and a
short question. docs/latency.md has the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import random_model
from model.errors import run_cli
from model.kernels.cuda_graph import CapturedFunction
from model.language_model import MambaLM
from model.presets import preset
from pipeline.latency.mamba_ssm_loop import mamba_ssm_twin
from pipeline.latency.timing import seconds_per_call

LENGTH = 749


@torch.no_grad()
def ways(llm: MambaLM, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the prefill functions to time, by name.

    Args:
        x: embeddings of the prompts, [batch, positions, width].
    """
    graph = CapturedFunction(llm.prefill, x)
    return {"eager": lambda: llm.prefill(x), "graph": lambda: graph(x)}


@torch.no_grad()
def mamba_ssm_way(llm: MambaLM, tokens: Tensor) -> Callable[[], Any]:
    """Return mamba_ssm's prefill: the forward pass with which its generation begins, and which fills its cache."""
    from mamba_ssm.utils.generation import InferenceParams

    model = mamba_ssm_twin(llm.config)

    @torch.no_grad()
    def prefill() -> Any:
        cache = InferenceParams(max_seqlen=tokens.shape[1] + 1, max_batch_size=tokens.shape[0])
        return model(tokens, inference_params=cache, num_last_tokens=1).logits

    return prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emma_v2", "emma_v1"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{torch.cuda.get_device_name()}, {LENGTH} positions\n| model | batch | way | ms |\n|---|---|---|---|")
    for name in args.models:
        llm = random_model(preset(name).llm)
        for batch in args.batches:
            tokens = torch.randint(llm.config.vocab_size, (batch, LENGTH), device="cuda")
            timed = {"mamba_ssm": mamba_ssm_way(llm, tokens), **ways(llm, llm.embed(tokens))}
            for way, call in timed.items():
                with torch.no_grad():
                    rows.append(
                        {"model": name, "batch": batch, "way": way, "ms": 1000 * seconds_per_call(call, at_least=0.3)}
                    )
                print(f"| {name} | {batch} | {way} | {rows[-1]['ms']:.1f} |", flush=True)
            del timed
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    run_cli(main)
