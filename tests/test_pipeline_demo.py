"""Parts of the demo: its report, output folder, recipe and processes. `make demo` runs the complete demo."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image

from model.errors import UserError
from pipeline.demo.__main__ import RECIPE, DemoFolder, empty_folder, finish, overrides, train_until
from pipeline.demo.processes import Commands, kill_process_tree, with_our_programs
from pipeline.demo.report import CONTROLS, Results, summary, table
from pipeline.evaluation.exact_match import Question
from pipeline.metrics.history import History, Ledger, Start
from pipeline.recipe import load_recipe
from preprocess.demo.scenes import draw_scenes, questions, render

HISTORY = History(
    ledger=Ledger(training=24.0, waiting_for_data=1.0),
    starts=[Start(step=0, time=0.0, before=""), Start(step=20, time=15.0, before="killed or crashed")],
    losses={step: (2 / step, None if step % 3 == 0 else 1 / step) for step in range(1, 51)},
    step=50,
)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Return results in which the trained model answers nine of ten questions correctly, and the controls none."""
    (tmp_path / "raw" / "held_out").mkdir(parents=True)
    asked = []
    for number, scene in enumerate(itertools.islice(draw_scenes("report"), 20)):
        render(scene).save(tmp_path / "raw" / "held_out" / f"{number}.png")
        asked += [
            Question(image=f"{number}.png", question=q.question, answer=q.answer, kind=q.kind) for q in questions(scene)
        ]
    said = ["?" if i % 10 == 0 else question.answer for i, question in enumerate(asked)]
    wrong = ["?" for _ in asked]
    return Results(
        seconds={"data": 1.04, "shards": 20.0, "train": 60.0, "answers": 5.0, "total": 86.04},
        samples=600,
        shards_job_s=10.0,
        rejects={"picture_missing": 2, "no_answer": 1},
        global_batch=8,
        killed_at_step=25,
        history=HISTORY,
        questions=asked,
        answers={"trained": said, "untrained": wrong, "commonest": wrong, "shuffled": wrong},
    )


def test_the_demo_summary_has_the_documented_keys(results: Results) -> None:
    facts = json.loads(json.dumps(summary(results)))
    assert facts["seconds"].keys() >= {"shards", "train", "answers", "total"}
    assert facts["samples_per_s"] == {"shards": 60.0, "train": 16.0}
    assert facts["exact_match"].keys() == {"trained", "untrained", "commonest", "shuffled"}
    assert facts["loss"].keys() == {"text", "align"}
    assert facts["loss"]["text"] == [2.0, pytest.approx(sum(2 / n for n in range(31, 51)) / 20, abs=1e-4)]
    assert (facts["resumed_at_step"], facts["killed_at_step"], facts["steps"]) == (20, 25, 50)
    assert (facts["rejects"], facts["rejects_by_reason"]) == (3, {"picture_missing": 2, "no_answer": 1})


def test_the_margin_is_the_models_score_minus_the_best_controls_score(results: Results) -> None:
    share = results.exact_match("trained")
    assert share == pytest.approx(0.9, abs=0.02)
    assert results.margin == share
    guessing = [question.answer if i % 2 else "?" for i, question in enumerate(results.questions)]
    assert replace(results, answers={**results.answers, "shuffled": guessing}).margin == pytest.approx(
        share - 0.5, abs=0.02
    )


def test_the_demo_table_shows_every_figure(results: Results) -> None:
    text = table(results)
    for word in (
        "shards",
        "60.0",
        "train",
        "16.0",
        "text",
        "align",
        "killed at step 25",
        "resumed at step 20",
        "3 rows",
    ):
        assert word in text
    for description in CONTROLS.values():
        assert description in text


def test_the_demo_prints_its_report_at_the_end(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(results, DemoFolder(tmp_path))
    assert "exact match" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["samples"] == 600
    for name in ("loss.png", "answers.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_the_demo_fails_after_its_report_if_the_model_did_not_learn(results: Results, tmp_path: Path) -> None:
    untaught = replace(results, answers=dict.fromkeys(results.answers, results.answers["untrained"]))
    with pytest.raises(UserError, match=r"beats the best control by 0\.0%"):
        finish(untaught, DemoFolder(tmp_path))
    assert (tmp_path / "summary.json").exists()


def test_the_demo_deletes_an_output_folder_only_if_an_earlier_demo_wrote_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(UserError, match="not written by an earlier demo"):
        empty_folder(mine)
    assert (mine / "thesis.tex").exists()

    own = tmp_path / "runs" / "demo"
    empty_folder(own)
    assert capsys.readouterr().out == ""
    (own / "summary.json").touch()
    empty_folder(own)
    assert "removing the output of an earlier demo" in capsys.readouterr().out
    assert not (own / "summary.json").exists()


def test_the_demo_recipe_sets_its_steps_and_saves_before_the_kill(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, overrides(DemoFolder(tmp_path)))
    assert recipe.steps
    assert recipe.checkpoint.every_steps < recipe.steps // 2
    assert recipe.log.every_steps == 1
    assert recipe.engine.device == "cpu"


# -- Processes ---------------------------------------------------------------------------------------------------------

FAMILY = """
import subprocess, sys, time
child = [sys.executable, "-c", "import time; print('child', flush=True); time.sleep(60)"]
subprocess.Popen(child, start_new_session=True)
for step in range(1, 600):
    print(f"step {step}/600", flush=True)
    time.sleep(0.05)
"""


def living_children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def others() -> set[psutil.Process]:
    """Return child processes that earlier tests left running, such as multiprocessing's resource tracker."""
    return living_children()


def test_the_demos_kill_ends_children_in_other_process_groups_and_keeps_the_log(
    tmp_path: Path, others: set[psutil.Process]
) -> None:
    commands = Commands(tmp_path / "logs")
    assert train_until(commands, [sys.executable, "-c", FAMILY], last_step=10) == 10
    log = (tmp_path / "logs" / "train.log").read_text()
    assert "child" in log
    assert "step 9/600" in log
    assert living_children() <= others


def test_the_error_for_a_run_that_ends_before_the_kill_shows_its_last_lines(tmp_path: Path) -> None:
    program = "print('step 1/9'); print('the disk is full')"
    with pytest.raises(UserError, match=r"(?s)training ended before step 5.*the disk is full"):
        train_until(Commands(tmp_path), [sys.executable, "-c", program], last_step=5)


def test_the_error_for_a_failing_command_shows_its_last_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; print('shown'); print('hidden'); sys.exit('out of luck')"
    with pytest.raises(UserError, match="exited with 1"):
        Commands(tmp_path).run("x", [sys.executable, "-c", program], keep=lambda line: line == "shown")
    out = capsys.readouterr().out
    assert "| shown" in out
    assert "| hidden" not in out
    assert "out of luck" in (tmp_path / "x.log").read_text()


def test_an_interrupted_demo_command_leaves_no_process_behind(tmp_path: Path, others: set[psutil.Process]) -> None:
    def interrupt(line: str) -> bool:
        if line == "child":
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        Commands(tmp_path).run("x", [sys.executable, "-c", FAMILY], keep=interrupt)
    assert living_children() <= others


def test_killing_a_process_that_has_already_ended_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert kill_process_tree(process.pid) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a.org,localhost", "no_proxy": "b.org"}, "b.org,a.org,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_commands_of_the_demo_reach_this_machine_without_a_proxy(monkeypatch, before, after):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    environment = with_our_programs({})
    assert environment["no_proxy"] == environment["NO_PROXY"] == after
