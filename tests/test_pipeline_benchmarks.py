"""The paper's benchmarks with a scripted model: scores that equal a hand count, resuming after a kill, and reports.

All evaluations run in one program, because importing lmms-eval takes ten seconds. Missing data and wrong arguments are
in test_pipeline_benchmark_arguments.py.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipeline.demo.processes import free_ports
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.inference.engine import InferenceEngine, load
from tests.support.launch import run_python
from tests.support.tiny_benchmarks import EXPECTED, TABLES, grey_level, write_benchmarks
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra [eval]")
KILL_AFTER = 30
TINY = ("mme", "mmbench", "vsr")  # some of the random answers for MMBench contain control characters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all evaluations. The folder has a log, the exit codes and a folder of results for each.

    killed     all benchmarks with the scripted model, killed after `KILL_AFTER` answers
    resumed    the same command on two ranks, with the same folder of results
    again      some benchmarks once more, which writes the model card
    tiny       the tiny model with random weights
    plugin     the tiny model through lmms-eval's own interface
    """
    folder = tmp_path_factory.mktemp("benchmarks")
    model, answers = save_tiny_model(folder / "model"), write_benchmarks(folder / "data")
    (model / "README.md").write_text("# The card\n")
    port = str(free_ports(1)[0])

    def scenario(name: str, *words: str, scripted: bool = True, **more: int | None) -> dict:
        out = folder / ("scripted" if scripted else "tiny")
        words = (str(model), *words, "--data", str(folder / "data"), "--out", str(out), "--device", "cpu")
        log = {"log": str(folder / f"{name}.log"), "port": port, "answers": answers if scripted else None}
        return {"words": words, "ranks": 1, "kill_after": None, "plugin": False, **log, **more}

    scenarios = [
        scenario("killed", "--tasks", "all", kill_after=KILL_AFTER),
        scenario("resumed", "--tasks", "all", ranks=2),
        scenario("again", "--tasks", "mme", "seed", "--card"),
        scenario("tiny", "--tasks", *TINY, scripted=False),
        scenario("plugin", scripted=False, plugin=True),
    ]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    program = ("-m", "tests.programs.evaluate_benchmarks", folder / "scenarios.json")
    done = run_python(
        *program, HF_HOME=str(folder / "cache"), CUDA_VISIBLE_DEVICES="", HF_ENDPOINT="http://127.0.0.1:1"
    )
    assert done.returncode == 0, done.stderr
    return folder


def codes(folder: Path, name: str) -> list[int]:
    return json.loads((folder / f"{name}.codes").read_text())


def log(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def computed(folder: Path, name: str) -> int:
    """Count the answers that an evaluation computed, on all ranks."""
    assert set(codes(folder, name)) == {0}, log(folder, name)
    return sum(int(count) for count in re.findall(r"computed (\d+) answers", log(folder, name)))


def results(folder: Path, name: str = "scripted") -> dict:
    return json.loads((folder / name / "results.json").read_text())


# -- Scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_score_of_scripted_answers_equals_the_hand_count(folder, name):
    assert codes(folder, "resumed") == [0, 0], log(folder, "resumed")
    assert results(folder)["benchmarks"][name]["score"] == pytest.approx(EXPECTED[name])
    full_score = 800 if name == "mme" else 100
    assert 0 < EXPECTED[name] < full_score, "an expected score of 0 or 100 would not show that scoring works"


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("pope", "pope_precision,none", 2 / 3),
        ("pope", "pope_recall,none", 1.0),
        ("hallusionbench", "qAcc,none", 0.0),
        ("hallusionbench", "fAcc,none", 1 / 3),
        ("mme", "mme_perception_score,none", 325.0),
        ("mme", "mme_cognition_score,none", 25.0),
    ],
)
def test_the_other_metrics_of_a_benchmark_are_reported_too(folder, name, metric, value):
    assert results(folder)["benchmarks"][name]["metrics"][metric] == pytest.approx(value)


def test_every_row_is_asked_except_questions_of_seed_about_videos(folder):
    rows = {name: len(table()) - (name == "seed") for name, table in TABLES.items()}
    assert {name: result["questions"] for name, result in results(folder)["benchmarks"].items()} == rows


# -- Resuming and ranks ------------------------------------------------------------------------------------------------


def test_two_ranks_continue_a_killed_evaluation_and_compute_each_answer_once(folder):
    assert codes(folder, "killed") == [-9]
    asked = sum(result["questions"] for result in results(folder)["benchmarks"].values())
    assert computed(folder, "resumed") == asked - KILL_AFTER


def test_results_are_the_same_before_and_after_the_kill(folder):
    before = dict(re.findall(r"^(\w+) +score (\d+\.\d)$", log(folder, "killed"), re.MULTILINE))
    assert list(before)[:3] == ["vqav2", "gqa", "vizwiz"]
    assert before == {name: f"{EXPECTED[name]:.1f}" for name in before}


def test_an_evaluation_that_is_repeated_computes_no_answer_again(folder):
    assert computed(folder, "again") == 0
    assert "mme             score 350.0" in log(folder, "again")
    assert len(results(folder)["benchmarks"]) == len(BENCHMARKS), "results of other benchmarks must be kept"


def test_progress_lines_show_the_rate_and_the_time_left(folder):
    assert re.search(r"^mme +5/5 questions  \d+\.\d/s  0:00:00 left$", log(folder, "resumed"), re.MULTILINE)


# -- Reports -----------------------------------------------------------------------------------------------------------


def test_the_table_has_the_papers_results_with_differences_and_marks(folder):
    table = (folder / "scripted/results.md").read_text()
    assert "| VQAv2ˢ | 53.3 | 76.3 (-23.0) | 75.7 (-22.4) | 74.9 (-21.6) | 3 |" in table
    assert "| MMBench cn | 50.0 | – | – | – | 4 |" in table
    assert table.count("|\n") == 2 + len(BENCHMARKS)
    assert re.findall(r"^[ˢʲ] ", table, re.MULTILINE) == ["ˢ ", "ʲ "]
    assert table in log(folder, "resumed")


def test_the_table_is_written_into_the_model_card_between_two_markers(folder):
    card = (folder / "model/README.md").read_text()
    assert card.startswith("# The card\n")
    assert card.count((folder / "scripted/results.md").read_text()) == 1


def test_a_figure_of_the_scores_is_written(folder):
    assert (folder / "scripted/results.png").read_bytes().startswith(b"\x89PNG")


# -- A real model ------------------------------------------------------------------------------------------------------


def test_a_tiny_model_runs_through_the_whole_chain(folder):
    assert codes(folder, "tiny") == [0], log(folder, "tiny")
    scores = {name: result["score"] for name, result in results(folder, "tiny")["benchmarks"].items()}
    assert scores.keys() == set(TINY) and scores["mme"] == 0.0, scores
    assert scores["vsr"] == pytest.approx(50.0, abs=25.0), "random weights know two words of VSR only"


def test_lmms_eval_finds_the_model_by_its_entry_point_and_compares_likelihoods(folder):
    assert codes(folder, "plugin") == [0], log(folder, "plugin")
    output = json.loads(log(folder, "plugin").splitlines()[-1])
    assert output["results"]["mme"]["mme_perception_score,none"] == 0.0
    truths = ["yes", "no", "yes", "no", "yes"]
    model, tokenizer = load(folder / "model", "cpu")
    engine, right = InferenceEngine(model, tokenizer), 0
    for row, truth in enumerate(truths):
        image = np.full((model.config.vision.image_px,) * 2 + (3,), grey_level(row), np.uint8)
        asked = engine.request(f"Is there a car? #pope-{row}", image)
        values = engine.log_likelihoods(asked, [tokenizer.encode(" yes"), tokenizer.encode(" no")])
        found = [-value for [[value, _]] in output["loglikelihoods"][str(row)]]
        assert found == pytest.approx(values, abs=0.05), "the image differs by JPEG artefacts only"
        right += (values[0] > values[1]) == (truth == "yes")
    assert output["results"]["likelihood"]["acc,none"] == right / len(truths)
