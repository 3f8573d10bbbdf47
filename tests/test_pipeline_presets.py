"""Tiny presets of all systems that the paper compares: training, resuming, export and generation."""

import json

import numpy as np
import pytest

from pipeline.export import export_run
from pipeline.inference.engine import InferenceEngine, load
from tests.support.launch import fork_python
from tests.support.tiny_data import build_shards

VARIANTS = [
    "tiny_v1",
    "tiny_cobra",
    "tiny_no_mff",
    "tiny_csm",
    "tiny_avf",
    "tiny_release",
]  # other tests cover tiny_v2


@pytest.fixture(scope="module")
def zephyr_shards(raw_mix, tmp_path_factory):
    return build_shards(raw_mix, tmp_path_factory.mktemp("shards") / "v1", model="tiny_v1")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_tiny_preset_trains_resumes_exports_and_generates_an_answer(recipe_file, zephyr_shards, tmp_path, name):
    run, out = tmp_path / "run", tmp_path / "model"
    words = [recipe_file, f"model={name}", f"data.shards={zephyr_shards}", f"run.dir={run}", "checkpoint.every_steps=1"]
    train = ["-m", "pipeline.train", *words, "steps=3"]
    (run / "control").mkdir(parents=True)
    (run / "control/stop").touch()  # under SLURM, a launch keeps an earlier stop request
    for done in (fork_python(*train, EMMA_JOB="1"), fork_python(*train)):
        assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps_seen = [line["step"] for line in facts if "event" not in line]
    assert steps_seen == [1, 2, 3]
    aligned = any(line.get("loss/align") is not None for line in facts)
    assert aligned == (name != "tiny_cobra")

    export_run(run, out, step=None, with_alignment=False)
    engine = InferenceEngine(*load(out, "cpu"))
    image = np.zeros((100, 100, 3), np.uint8)
    assert len(engine.complete([engine.request("Which colour?", image, max_new_tokens=3)])) == 1
