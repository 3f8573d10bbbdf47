"""Too little memory is the recipe's fault, unless a step of just this kind has had room."""

import json

import pytest
import torch

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RetryableError
from pipeline.recipe import load_recipe
from pipeline.run import preflight
from pipeline.run.out_of_memory import explain_out_of_memory, memory_settings

RANKS = Ranks(3, 3, 8, torch.device("cpu"))
STEP, SAVE = {"step": 10, "loss/text": 1.0}, {"event": "save", "step": 4}
MISTAKE, LOST = (UserError, "lower optim.micro_batch (now 4)"), (RetryableError, "does something else use this node?")


@pytest.fixture
def run(recipe_file, tmp_path):
    """The recipe, and what tells the run folder of a start with these overrides, on so many ranks."""

    def recipe(*overrides):
        return load_recipe(recipe_file, [*overrides, f"run.dir={tmp_path}"], planning=True)

    def start(*overrides, ranks=8):
        return {"event": "resume", "step": 0, "world_size": ranks, "settings": memory_settings(recipe(*overrides))}

    def tell(lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return recipe(), start, tell


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        pytest.param(lambda start: [], MISTAKE, id="the first start"),
        pytest.param(lambda start: [start(), STEP], LOST, id="a step was done"),
        pytest.param(lambda start: [start(), SAVE], LOST, id="a step was saved"),
        pytest.param(lambda start: [start()], MISTAKE, id="none was done"),
        pytest.param(lambda start: [start("optim.micro_batch=2"), STEP, start()], MISTAKE, id="of another size"),
        pytest.param(lambda start: [start("engine.segment_layers=1"), STEP], MISTAKE, id="recomputing more"),
        pytest.param(lambda start: [start(ranks=16), STEP], MISTAKE, id="on more ranks"),
        pytest.param(lambda start: [start(), STEP, start(ranks=16)], LOST, id="on as many ranks, once"),
    ],
)
def test_a_gpu_without_room_ends_in_one_line_and_is_tried_again_only_where_it_had_room(run, told, expected):
    recipe, start, tell = run
    kind, advice = expected
    if lines := told(start):
        tell(lines)
    with pytest.raises(kind) as raised, explain_out_of_memory(recipe, RANKS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
    line = str(raised.value)
    assert line.startswith("rank 3 on ")
    assert "Tried to allocate 2 GiB" in line
    assert "More words" not in line
    assert advice in line


def test_a_node_that_something_else_has_filled_does_not_end_a_run_that_had_room(run, monkeypatch):
    recipe, start, tell = run
    monkeypatch.setattr(preflight, "prefetched_bytes", lambda _: 1 << 60)
    context = preflight.Context(recipe=recipe, ranks=RANKS)
    with pytest.raises(UserError, match="--shm-size"):
        preflight.check_shared_memory(context)
    tell([start(), STEP])
    with pytest.raises(RetryableError, match="does something else use this node"):
        preflight.check_shared_memory(context)
