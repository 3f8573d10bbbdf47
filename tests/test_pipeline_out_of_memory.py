"""Out-of-memory errors: retryable if a step with the same settings has succeeded before, else user errors."""

import json

import pytest
import torch

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError
from pipeline.recipe import load_recipe
from pipeline.run import preflight
from pipeline.run.out_of_memory import explain_out_of_memory

RANKS = Ranks(rank=3, local_rank=3, world_size=8, device=torch.device("cpu"))
STEP, SAVE = {"step": 10, "loss/text": 1.0}, {"event": "save", "step": 4}
MISTAKE, LOST = (UserError, "lower optim.micro_batch (now 4)"), (RetryableError, "does another process use this node?")


@pytest.fixture
def run(recipe_file, tmp_path):
    """Return the recipe, a function that returns a launch event, and a function that writes `metrics.jsonl`."""

    def recipe(*overrides):
        return load_recipe(recipe_file, [*overrides, f"run.dir={tmp_path}"], planning=True)

    def start(*overrides, ranks=8):
        return {"event": "resume", "step": 0, "world_size": ranks, "settings": recipe(*overrides).memory_settings()}

    def write_metrics(lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return recipe(), start, write_metrics


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        pytest.param(lambda start: [], MISTAKE, id="the first start"),
        pytest.param(lambda start: [start(), STEP], LOST, id="a step was done"),
        pytest.param(lambda start: [start(), SAVE], LOST, id="a step was saved"),
        pytest.param(lambda start: [start()], MISTAKE, id="no step was done"),
        pytest.param(lambda start: [start("optim.micro_batch=2"), STEP, start()], MISTAKE, id="another micro-batch"),
        pytest.param(lambda start: [start("engine.segment_layers=1"), STEP], MISTAKE, id="more recomputation"),
        pytest.param(lambda start: [start(ranks=16), STEP], MISTAKE, id="more ranks"),
        pytest.param(lambda start: [start(), STEP, start(ranks=16)], LOST, id="as many ranks, two starts ago"),
    ],
)
def test_out_of_memory_is_retryable_only_if_a_step_with_these_settings_succeeded(run, history, expected):
    recipe, start, write_metrics = run
    kind, advice = expected
    if lines := history(start):
        write_metrics(lines)
    with pytest.raises(kind) as raised, explain_out_of_memory(recipe, RANKS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
    line = str(raised.value)
    assert line.startswith("rank 3 on ")
    assert "Tried to allocate 2 GiB" in line
    assert "More words" not in line
    assert advice in line


def test_full_shared_memory_is_retryable_only_if_an_earlier_launch_had_enough(run, monkeypatch):
    recipe, start, write_metrics = run
    monkeypatch.setattr(preflight, "prefetched_bytes", lambda _: 1 << 60)
    context = preflight.Context(recipe=recipe, ranks=RANKS)
    with pytest.raises(UserError, match="--shm-size"):
        preflight.check_shared_memory(context)
    write_metrics([start(), STEP])
    with pytest.raises(RetryableError, match="does another process use this node"):
        preflight.check_shared_memory(context)
