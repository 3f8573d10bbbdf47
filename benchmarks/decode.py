"""Decoding benchmark: tokens per second of greedy decoding, compared with the limit set by the memory bandwidth.

    python -m benchmarks.decode --json decode.json                            # on a machine with one GPU; minutes
    python -m benchmarks.decode --models emma_v2 --batches 1 --states fp32 --only fused

The models are full-size language models with random bf16 weights, which decode after a short random prompt. For each
model, batch size and state dtype, four implementations are timed: our fused step as a CUDA graph (`fused`), the model's
plain PyTorch step (`eager`), the same step as a CUDA graph (`eager, graph`), and mamba_ssm's `generate(cg=True)`. The
ceiling assumes that each step reads every weight once and reads and writes every state once, at the bandwidth of a
large copy on the same GPU. docs/latency.md has the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.config import MambaConfig
from model.errors import run_cli
from model.kernels.decode_graph import DecodeGraph
from model.language_model import MambaLM
from model.presets import preset
from pipeline.latency.contender import bytes_per_step
from pipeline.latency.mamba_ssm_loop import mamba_ssm_twin
from pipeline.latency.timing import copy_bandwidth, seconds_per_call

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT = 16


def kernels_per_call(call: Callable[[], Any]) -> int:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def random_model(config: MambaConfig) -> MambaLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return MambaLM(config).to(torch.bfloat16).requires_grad_(False)


@torch.no_grad()
def fused_step(llm: MambaLM, batch: int, state_dtype: torch.dtype) -> Callable[[], Any]:
    tokens = torch.randint(llm.config.vocab_size, (batch, PROMPT), device="cuda")
    logits, cache = llm.prefill(llm.embed(tokens))
    engine = DecodeGraph(llm, batch, state_dtype=state_dtype)
    engine.load(cache)
    engine.step(logits.argmax(-1))
    return engine.step


@torch.no_grad()
def eager_steps(llm: MambaLM, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the model's plain PyTorch greedy step, and the same step as a CUDA graph."""
    tokens = torch.randint(llm.config.vocab_size, (batch, PROMPT), device="cuda")
    logits, cache = llm.prefill(llm.embed(tokens))
    chosen = logits.argmax(-1)

    @torch.no_grad()
    def step() -> None:
        torch.argmax(llm.decode(chosen, cache), -1, out=chosen)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return step, graph.replay


def mamba_ssm_seconds(llm: MambaLM, batch: int, steps: int = 128) -> float:
    """Return the seconds per token of mamba_ssm's greedy loop: the time of a long generation minus a short one's."""
    model = mamba_ssm_twin(llm.config)
    prompt = torch.randint(llm.config.vocab_size, (batch, PROMPT), device="cuda")

    def generate(length: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(prompt, max_length=PROMPT + length, cg=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    generate(steps + 8)
    return statistics.median((generate(steps + 8) - generate(8)) / steps for _ in range(3))


def measure(llm: MambaLM, batch: int, state: str, bandwidth: float, only: str) -> list[dict[str, Any]]:
    """Return the table's rows for one model, batch size and state dtype.

    The baselines use their own state dtypes, so they are timed only once per model and batch size, together with fp32.
    """
    ceiling = batch * bandwidth / bytes_per_step(llm, llm.config, batch, STATES[state])
    timed: list[tuple[str, float, int | None]] = []
    step = fused_step(llm, batch, STATES[state])
    timed.append(("fused", seconds_per_call(step), kernels_per_call(step)))
    del step
    gc.collect()
    if state == "fp32" and not only:
        eager, replay = eager_steps(llm, batch)
        timed.append(("eager, graph", seconds_per_call(replay), kernels_per_call(replay)))
        timed.append(("eager", seconds_per_call(eager), None))
        del eager, replay
        gc.collect()
        timed.append(("mamba_ssm, graph", mamba_ssm_seconds(llm, batch), None))
        gc.collect()
    torch.cuda.empty_cache()
    return [
        {
            "model": llm.config.kind,
            "batch": batch,
            "state": state,
            "step": name,
            "ms": 1000 * seconds,
            "tokens_per_s": batch / seconds,
            "ceiling": ceiling,
            "share": batch / seconds / ceiling,
            "kernels": kernels,
        }
        for name, seconds, kernels in timed
    ]


def line(row: dict[str, Any]) -> str:
    head = f"| {row['model']} | {row['batch']} | {row['state']} | {row['step']} | {row['ms']:.3f} |"
    return head + f" {row['tokens_per_s']:.0f} | {row['ceiling']:.0f} | {row['share']:.0%} | {row['kernels'] or ''} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emma_v2", "emma_v1"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--states", nargs="+", choices=STATES, default=["fp32", "bf16"])
    parser.add_argument("--only", default="", choices=["", "fused"], help="leave out the baselines")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth, rows = copy_bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    print("| model | batch | state | step | ms | tok/s | ceiling | share | kernels |\n" + "|---" * 9 + "|")
    for name in args.models:
        llm = random_model(preset(name).llm)
        for batch in args.batches:
            for state in args.states:
                for row in measure(llm, batch, state, bandwidth, args.only):
                    print(line(row), flush=True)
                    rows.append(row)
        del llm
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    run_cli(main)
