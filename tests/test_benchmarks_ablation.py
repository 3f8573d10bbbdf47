"""The ablation benchmark: exact questions, runs that continue after an interruption, and the whole chain when tiny."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import configs, data, runner
from benchmarks.ablation.configs import SEARCH_SEED, SIZES, VARIANTS, Run, search_runs, variant_config
from benchmarks.ablation.report import best_settings, final_runs, hallucinated, paired_difference
from benchmarks.ablation.scenes import KINDS, LABELS, NONE, SCENE_PX, draw_scene, patch_labels, render
from benchmarks.ablation.train import Batches, start, train
from model.config import IGNORE_INDEX
from model.errors import UserError
from model.presets import preset
from preprocess.demo.scenes import COLOURS, SHAPES
from preprocess.prompts import load_tokenizer

MICRO = SIZES["micro"]
SCENES = [draw_scene(random.Random(f"test {number}")) for number in range(300)]


# -- Scenes ------------------------------------------------------------------------------------------------------------


def test_the_answers_of_a_scene_follow_from_its_marks():
    checked: Counter[str] = Counter()
    for scene in SCENES:
        shapes = [(mark.colour, mark.name) for mark in scene.marks if mark.name in SHAPES]
        signs: dict[str, str] = {}
        for mark in scene.marks:
            if mark.name not in SHAPES and mark.colour:
                signs[mark.colour] = signs.get(mark.colour, "") + mark.name
        for asked in scene.questions:
            words = asked.question.strip("?").split()
            if asked.kind == "count" and "shapes" in words:
                expected = str(sum(name == words[2] for _, name in shapes))
            elif asked.question.startswith("Is there a ") and words[-1] in SHAPES:
                expected = "yes" if (words[-2], words[-1]) in shapes else "no"
            elif asked.question.startswith("Is there a sign"):
                expected = "yes" if words[-1] in signs.values() else "no"
            elif asked.question.endswith("sign say?"):
                expected = signs.get(words[3], NONE)
            elif asked.question.startswith("What colour is the sign"):
                expected = {code: colour for colour, code in signs.items()}.get(words[-1], NONE)
            elif asked.question.startswith("Where is the ") and words[-1] in SHAPES:
                expected = asked.answer if (words[-2], words[-1]) in shapes else NONE
                assert (expected == NONE) == (asked.kind == "absent")
            else:
                continue
            assert asked.answer == expected
            checked[asked.kind] += 1
    assert min(checked[kind] for kind in ("count", "exists", "absent", "text", "colour", "position")) > 5


def test_scenes_ask_every_kind_of_question_and_answer_none_only_if_absent():
    kinds = Counter(asked.kind for scene in SCENES for asked in scene.questions)
    assert kinds.keys() == set(KINDS)
    assert all((asked.answer == NONE) == (asked.kind == "absent") for scene in SCENES for asked in scene.questions)
    answers = Counter(asked.answer for scene in SCENES for asked in scene.questions if asked.kind == "exists")
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_patch_labels_name_the_marks_in_each_patch():
    scene = next(scene for scene in SCENES if scene.marks[0].name in SHAPES)
    labels = patch_labels(scene, 14).reshape(14, 14, -1)
    mark = scene.marks[0]
    patch = labels[int(mark.y / SCENE_PX * 14), int(mark.x / SCENE_PX * 14)]
    assert patch[LABELS.index(mark.name)]
    assert patch[LABELS.index(mark.colour)]
    assert labels.any(-1).sum() == len({(int(m.y / 14), int(m.x / 14)) for m in scene.marks})
    image = render(scene, SCENE_PX)
    middle = image[round(mark.y), round(mark.x)].astype(int)
    assert mark.name == "ring" or np.abs(middle - COLOURS[mark.colour]).max() < 20


# -- Data and variants -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> runner.Workspace:
    workspace = runner.Workspace(folder=tmp_path_factory.mktemp("ablation") / "a", size="micro")
    workspace.prepare(1)
    return workspace


def test_dialogues_are_tokenized_with_single_characters_and_supervised_answers(workspace):
    split = data.load(workspace.data, "train")
    tokenizer = load_tokenizer(workspace.data / "tokenizer")
    assert len(split.images) == MICRO.images["train"]
    for questions, tokens, targets in zip(split.questions, split.tokens, split.targets, strict=True):
        answers = tokenizer.decode(targets[targets != IGNORE_INDEX].tolist(), skip_special_tokens=False)
        assert answers.split("<|endoftext|>")[:-1] == [asked.answer for asked in questions]
        assert all(asked.question in tokenizer.decode(tokens.tolist()) for asked in questions)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("K7P")] == ["K", "7", "P"]
    before = (workspace.data / "train-tokens.npy").stat().st_mtime_ns
    assert workspace.prepare(1)["data"] == json.loads((workspace.data / "data.json").read_text())["sha256"]
    assert (workspace.data / "train-tokens.npy").stat().st_mtime_ns == before


def test_the_variants_differ_from_emma_as_their_presets_do():
    for variant in VARIANTS[1:]:
        small, full = variant_config(SIZES["small"], variant), preset(f"{variant}_v2")
        assert small.cross_scan == full.cross_scan
        assert (small.alignment is None) == (full.alignment is None)
        if small.alignment and full.alignment:
            assert (small.alignment.target, small.alignment.fusion) == (full.alignment.target, full.alignment.fusion)
    emma = variant_config(SIZES["small"], "emma").alignment
    assert emma is not None
    assert emma.taps == (4, 6, 9)


def test_the_search_tries_every_setting_for_every_variant_alike():
    runs = search_runs("small")
    tried = {variant: {(run.lr, run.align_factor) for run in runs if run.variant == variant} for variant in VARIANTS}
    assert tried["emma"] == tried["no_mff"] == tried["avf"] == tried["csm"]
    assert {lr for lr, _ in tried["cobra"]} == {lr for lr, _ in tried["emma"]}
    assert {run.seed for run in runs} == {SEARCH_SEED}
    assert {run.seed for run in final_runs({"emma": runs[0]}, 5)} == {0, 1, 2, 3, 4}


# -- Runs --------------------------------------------------------------------------------------------------------------


def test_an_interrupted_training_continues_with_the_same_bits(workspace, tmp_path, monkeypatch):
    run = Run(size="micro", variant="emma", seed=3, lr=1e-3, align_factor=1.0)
    towers, batches = runner._inputs(workspace)
    straight = start(run, torch.device("cpu"))
    assert train(straight, run, towers, batches, until=time.time() + 99, save_to=None)

    broken = start(run, torch.device("cpu"))
    clock = iter([0.0, 0.0, 1.0])  # two steps, then the time is up
    monkeypatch.setattr("benchmarks.ablation.train.time.time", lambda: next(clock))
    assert not train(broken, run, towers, batches, until=0.5, save_to=tmp_path / "p.pt")
    monkeypatch.undo()
    resumed = start(replace(run, seed=9), torch.device("cpu"))
    resumed.restore(tmp_path / "p.pt")
    assert resumed.step == 2
    assert train(resumed, run, towers, batches, until=time.time() + 99, save_to=None)
    for ours, theirs in zip(resumed.emma.parameters(), straight.emma.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.curve == straight.curve


def test_every_image_occurs_once_per_epoch_in_an_order_that_depends_on_the_seed(workspace):
    batches = Batches(MICRO, data.load(workspace.data, "train"), torch.device("cpu"))
    epochs = [
        [image.numpy().tobytes() for step in range(first, first + 4) for image in batches.at(seed, step).pixels]
        for seed, first in ((0, 0), (0, 4), (1, 0))
    ]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def ablate(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["ablation", *map(str, words), "--size", "micro", "--processes", "1"])
    ablation.main()


def test_the_whole_chain_reports_every_run_and_asks_test_questions_only_at_the_end(workspace, monkeypatch, capsys):
    read: list[str] = []
    real_load = data.load

    def load(folder: Path, split: str) -> data.Split:
        read.append(split)
        return real_load(folder, split)

    monkeypatch.setattr(data, "load", load)
    few = ("--variants", "emma", "cobra", "--seeds", "2")
    with pytest.raises(UserError, match="the search of cobra, emma is not complete"):
        ablate(monkeypatch, "test", workspace.folder, *few)

    real_train = runner.train
    monkeypatch.setattr(
        runner, "train", lambda progress, run, *a, **k: 1 / 0 if run.lr == 2e-3 else real_train(progress, run, *a, **k)
    )
    ablate(monkeypatch, "search", workspace.folder, *few)
    assert "{'done': 2, 'failed': 2}" in capsys.readouterr().out
    monkeypatch.setattr(runner, "train", real_train)
    ablate(monkeypatch, "search", workspace.folder, *few)
    assert "{'done': 4}" in capsys.readouterr().out
    assert "test" not in read

    ablate(monkeypatch, "test", workspace.folder, *few)
    assert read.count("test") == 4
    assert (workspace.folder / "models/emma/config.json").exists()
    capsys.readouterr()
    ablate(monkeypatch, "report", workspace.folder)
    report = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    assert ["emma", "search", "2", "2", "0", "0", "0", "1"] in [line[:8] for line in lines]
    assert ["no_mff", "search", "0", "0", "0", "0", "0", "0"] in [line[:8] for line in lines]
    [header] = [line for line in lines if "most common answer" in line]
    assert header[1:3] == ["emma (2 seeds)", "cobra (2 seeds)"]
    [error] = [line for line in lines if line[0] == "reconstruction error" and len(line) == len(header)]
    assert error[2] == "-"
    assert 0.5 < float(error[1].split()[0]) < 3
    probes = next(line for line in lines if line[:2] == ["position", "cobra"])
    assert all(0 <= float(value) <= 1 for value in probes[2:])


def test_runs_with_different_data_or_settings_have_different_files():
    run, inputs = search_runs("micro")[0], {"data": "a", "towers": "b"}
    keys = {run.key(inputs), run.key({**inputs, "data": "c"}), replace(run, lr=5.0).key(inputs)}
    assert len(keys) == 3
    assert run.key(inputs) == replace(run).key(dict(inputs))


def test_runs_with_different_data_are_not_reported_together(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    run, folder = search_runs("micro")[0], runner.Workspace(folder=tmp_path, size="micro")
    for inputs in ({"data": "a"}, {"data": "b"}):
        record = {"run": vars(run), "inputs": inputs}
        (tmp_path / f"runs/{run.key(inputs)}.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="different data or towers"):
        folder.results()
    monkeypatch.setattr(configs, "VERSION", configs.VERSION + 1)
    assert folder.results() == ([], 2)


# -- Report ------------------------------------------------------------------------------------------------------------


def test_the_interval_of_paired_differences_uses_students_t_distribution():
    # mean 0.02, standard deviation 0.0158, five pairs: half width 2.776 · 0.0158 / √5
    assert paired_difference([0.0, 0.01, 0.02, 0.03, 0.04]) == "+0.020 [+0.000, +0.040]"
    assert paired_difference([0.5]) == "+0.500"


def test_hallucinations_are_wrong_answers_about_missing_things():
    answers = {"right": {"absent": 6}, "total": {"absent": 10}, "false_yes": [1, 10]}
    assert hallucinated(answers) == (4 + 1) / 20


def test_the_best_settings_have_the_highest_validation_accuracy_of_a_complete_grid():
    runs = [run for run in search_runs("micro") if run.variant in ("emma", "cobra")]
    records: list[dict[str, Any]] = [
        {
            "outcome": "done",
            "run": vars(run),
            "val": {"right": dict.fromkeys(KINDS, int(run.lr == 2e-3)), "total": dict.fromkeys(KINDS, 1)},
        }
        for run in runs
    ]
    assert {name: run.lr for name, run in best_settings(records, "micro").items()} == {"emma": 2e-3, "cobra": 2e-3}
    incomplete = [record for record in records if (record["run"]["variant"], record["run"]["lr"]) != ("emma", 1e-3)]
    assert best_settings(incomplete, "micro").keys() == {"cobra"}
