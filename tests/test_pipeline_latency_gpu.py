"""Latency on a GPU: every implementation runs with and without its CUDA graph, and a graph chooses the same tokens.

python -m pytest tests/test_pipeline_latency_gpu.py
"""

import json
from pathlib import Path

import pytest
import torch

from pipeline.latency.peers import PEERS, PeerModel, TransformersPeer
from tests.support.launch import run_python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the kernel packages and Triton call deprecated torch functions
]


@pytest.mark.parametrize("name", ["tiny_phi2_siglip", "tiny_llama_clip"])
def test_a_peers_graph_chooses_the_same_tokens_as_its_plain_steps(name: str) -> None:
    torch.manual_seed(0)
    model = PeerModel(PEERS[name], torch.device("cuda"), torch.float32)
    graph = TransformersPeer(model, batch=2, tokens=12, graph=True)
    plain = TransformersPeer(model, batch=2, tokens=12, graph=False)
    plain.pixels, plain.text = graph.pixels, graph.text
    chosen: list[torch.Tensor] = []
    graph.answer(12, lambda phase: chosen.append(graph.token[:, 0].clone()))
    with torch.no_grad():
        prompt = torch.cat([model.embed_image(plain.pixels), model.llm.get_input_embeddings()(plain.text)], 1)
        expected = plain.generate(prompt, 12, lambda phase: None)
    assert torch.equal(torch.stack(chosen[1:], 1), expected)  # the first mark is that of the image encoders


def test_every_implementation_runs_with_and_without_graphs(tmp_path: Path) -> None:
    words = ["-m", "pipeline.latency", "tiny_v2", "tiny_v1", "--peers", "tiny_cobra", "tiny_phi2_siglip"]
    words += ["tiny_llama_clip", "mamba_ssm", "--batches", "1", "4", "--lengths", "32", "--tokens", "16"]
    rows = tmp_path / "rows.json"
    done = run_python(*words, "--seconds", "0", "--repeats", "3", "--json", rows, timeout=600)
    assert done.returncode == 0, done.stderr
    measured = json.loads(rows.read_text())
    assert [row for row in measured if "error" in row] == []
    assert {(row["implementation"], row["graph"]) for row in measured} == {
        (implementation, graph) for implementation in ("ours", "transformers", "mamba_ssm") for graph in (True, False)
    }
