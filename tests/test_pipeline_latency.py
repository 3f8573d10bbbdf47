"""Latency: cases and their order, the computed times, the file of rows, and the command on a CPU."""

import itertools
import json
from typing import Any

import pytest
import torch

from model.errors import UserError
from pipeline.latency import measure as measuring
from pipeline.latency.cases import FIRST_BATCHES, Selection
from pipeline.latency.contender import IMAGE, PROMPT, QUESTION, TOKEN
from pipeline.latency.measure import Case, Effort, measure
from pipeline.latency.own import EngineAnswers, open_model
from pipeline.latency.results import Results
from preprocess.prompts import load_tokenizer
from tests.support.launch import fork_python
from tests.support.tiny_model import save_tiny_model

CPU = torch.device("cpu")
CASE = Case(model="tiny_v2", implementation="ours", graph=False, state="fp32", batch=2, tokens=5)


class Scripted:
    """A contender that does nothing but mark its phases, with a prefill in two parts."""

    bytes_per_step, prompt_tokens = 100, 7

    def answer(self, tokens: int, mark: Any) -> None:
        for phase in [IMAGE, PROMPT, IMAGE, PROMPT, *[TOKEN] * (tokens - 1)]:
            mark(phase)


class ScriptedMarks:
    """Marks with 5 ms for each part of the image encoders, 10 ms for each prefill, then 1, 2, 3, … ms per token."""

    def __init__(self, device: torch.device) -> None:
        self.phases: list[str] = []

    def __call__(self, phase: str) -> None:
        self.phases.append(phase)

    def seconds(self) -> list[tuple[str, float]]:
        numbers = itertools.count(1)
        times = {IMAGE: lambda: 0.005, PROMPT: lambda: 0.010, TOKEN: lambda: next(numbers) / 1000}
        return [(phase, times[phase]()) for phase in self.phases[1:]]


def test_a_row_holds_the_times_of_each_phase_and_percentiles(monkeypatch):
    monkeypatch.setattr(measuring, "Marks", ScriptedMarks)
    row = measure(CASE, lambda case: Scripted(), Effort(seconds=9.0, repeats=2), CPU, bandwidth=80_000.0)
    assert (row["repeats"], row["measured_tokens"], row["prompt_tokens"]) == (2, 5, 7)
    assert row["towers_ms"] == pytest.approx(10)
    assert row["first_token_ms"] == pytest.approx(30)
    assert row["token_ms"] == row["p50_ms"] == pytest.approx(2.5)
    assert row["p99_ms"] == pytest.approx(4)
    assert row["answer_s"] == pytest.approx(0.040)
    assert row["tokens_per_s"] == pytest.approx(2 * 5 / 0.040)
    assert row["share"] == pytest.approx(100 / 0.0025 / 80_000)


def test_a_long_answer_is_computed_from_fewer_tokens_if_time_is_short(monkeypatch):
    monkeypatch.setattr(measuring, "Marks", ScriptedMarks)
    case = Case(**{**CASE.__dict__, "tokens": 1000})
    row = measure(case, lambda case: Scripted(), Effort(seconds=0.0), CPU, bandwidth=1.0)
    assert (row["repeats"], row["measured_tokens"]) == (3, measuring.MIN_TOKENS)
    assert row["answer_s"] == pytest.approx(0.030 + 999 * row["token_ms"] / 1000)


def test_a_case_that_cannot_run_gives_a_row_with_the_reason():
    def missing(case: Case) -> Scripted:
        raise ImportError("No module named 'mamba_ssm'\nsecond line")

    row = measure(CASE, missing, Effort(seconds=0.0), CPU, bandwidth=1.0)
    assert row["error"] == "No module named 'mamba_ssm'"
    assert row["model"] == "tiny_v2"


def test_a_model_that_predicts_only_the_end_of_text_still_generates_all_tokens(tmp_path):
    own = open_model(str(save_tiny_model(tmp_path / "model")), CPU)
    own.loaded.emma.llm.backbone.embedding.weight.zero_()  # all logits are equal, so token 0 is chosen: the end of text
    answers = EngineAnswers(own, batch=2, state="fp32", graph=False)
    phases: list[str] = []
    answers.answer(6, phases.append)
    assert phases == [IMAGE, PROMPT, *[TOKEN] * 5]
    assert answers.prompt_tokens == 49 + len(own.prompt)
    assert QUESTION in load_tokenizer(tmp_path / "model").decode(own.prompt)


def test_the_first_cases_are_batches_1_and_64_of_the_model_then_those_of_peers():
    selection = Selection(
        models=["emma_v2"],
        others=["cobra"],
        peers=["phi2_siglip"],
        loop=True,
        states=["fp32", "bf16"],
        dtype="bf16",
        batches=[1, 2, 16, 64],
        lengths=[256, 512],
        tokens=256,
        graphs=True,
    )
    cases = selection.cases()
    assert len(set(cases)) == len(cases) == 2 * (2 * 4 + 1) + 2 * (4 + 1) * 3
    assert [(case.model, case.batch, case.state, case.graph) for case in cases[:4]] == [
        ("emma_v2", 1, "fp32", True),
        ("emma_v2", 1, "fp32", False),
        ("emma_v2", 1, "bf16", True),
        ("emma_v2", 64, "fp32", True),
    ]
    peers = [(case.implementation, case.batch) for case in cases if case.graph][4:10]
    assert peers == [(name, batch) for name, batches in FIRST_BATCHES.items() for batch in batches]


def test_rows_are_kept_by_card_and_a_row_with_an_error_is_measured_again(tmp_path):
    here, elsewhere = {"card": "A", "versions": {}}, {"card": "B", "versions": {}}
    results = Results(tmp_path / "rows.json")
    row = {**CASE.__dict__, "token_ms": 1.0}
    results.add({**CASE.__dict__, "error": "out of memory"}, here)
    assert not results.holds(CASE, here)
    results.add(row, here)
    results.add(row, elsewhere)
    again = Results(tmp_path / "rows.json")
    assert again.holds(CASE, here)
    assert again.of(here) == [row | {"environment": here}]
    assert again.latest == elsewhere


@pytest.mark.parametrize("content", ["{", '[{"model": "x"}]', "7"])
def test_a_file_that_holds_no_rows_is_refused(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match="not a file of latency rows"):
        Results(tmp_path / "rows.json")


def test_the_command_measures_models_and_peers_and_continues(tmp_path):
    words = ["-m", "pipeline.latency", "tiny_v2", "--peers", "tiny_phi2_siglip", "tiny_llama_clip"]
    sizes = ["--batches", "1", "2", "--lengths", "8", "--tokens", "6", "--seconds", "0", "--device", "cpu"]
    files = ["--json", tmp_path / "rows.json", "--markdown", tmp_path / "table.md", "--figure", tmp_path / "speed.png"]
    first = fork_python(*words, *sizes, *files)
    assert first.returncode == 0, first.stderr
    assert "rows with CUDA graphs" in first.stdout
    assert "9 of 9 rows to measure" in first.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row.get("error") for row in rows] == [None] * 9
    assert {(row["model"], row["prompt_tokens"]) for row in rows} == {
        ("tiny_v2", 49 + 20),
        ("tiny_phi2_siglip", 64 + 20),
        ("tiny_llama_clip", 16 + 20),
    }
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| tiny_llama_clip (MobileVLM V2's size) | 2 | no | fp32 |" in table
    assert "| 6 tokens | 8 tokens |" in table
    second = fork_python(*words, *sizes, *files)
    assert "0 of 9 rows to measure" in second.stdout
    drawn = fork_python("-m", "pipeline.latency", "--tokens", "6", *files)
    assert table in drawn.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny_v3"], "error: tiny_v3: neither an exported folder nor a preset, did you mean 'tiny_v2'"),
        (["tiny_v2", "--peers", "phi2"], "error: --peers phi2: not known"),
        (["tiny_v2", "--batches", "0"], "error: --batches 0: expected numbers above 0"),
        ([], "error: rows.json: holds no rows"),
    ],
)
def test_a_user_error_is_reported_in_one_line(tmp_path, words, message):
    done = fork_python("-m", "pipeline.latency", *words, "--json", "rows.json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message), done.stderr
