"""Checkpoint retention: which checkpoints are kept, and failing deletions."""

import shutil

import pytest

from pipeline.checkpoint.retention import count_kept_forever, delete, prune, steps_to_keep
from pipeline.recipe import CheckpointConfig

STEPS = [6, 8, 10, 12]


@pytest.mark.parametrize(
    ("good", "keep_last", "keep_every", "has_space", "kept"),
    [
        ({6, 8, 10, 12}, 2, 0, True, {10, 12}),
        ({6, 8, 10, 12}, 2, 8, True, {8, 10, 12}),  # 8 is kept forever
        ({10, 12}, 3, 0, True, {6, 8, 10, 12}),  # 6 or 8 may be damaged, so both are kept
        ({10, 12}, 3, 0, False, {8, 10, 12}),  # the oldest is deleted anyway, to make space for the next save
        ({12}, 2, 0, True, {8, 10, 12}),
        ({8, 10, 12}, 3, 0, True, {8, 10, 12}),
        ({12}, 1, 6, True, {6, 12}),
    ],
)
def test_an_unverified_checkpoint_never_replaces_a_good_one(good, keep_last, keep_every, has_space, kept):
    assert steps_to_keep(STEPS, good, keep_last=keep_last, keep_every=keep_every, has_space=has_space) == kept


def test_launches_that_each_save_only_once_do_not_accumulate_checkpoints():
    steps = {1}
    for step in range(2, 30):
        steps = steps_to_keep([*steps, step], good={step - 1, step}, keep_last=3, keep_every=0, has_space=True)
    assert steps == {25, 26, 27, 28, 29}


@pytest.mark.parametrize(
    ("every_steps", "keep_last", "keep_every", "total_steps", "forever"),
    [
        (2, 3, 3, 12, 1),  # of 2, 4, …, 12, the last three are the newest, and step 6 is kept forever
        (2, 3, 3, 60, 9),
        (2, 3, 0, 60, 0),
        (4, 1, 4, 10, 2),  # 4 and 8 are kept forever; step 10, the last, is the newest
        (500, 3, 0, 100, 0),
    ],
)
def test_count_kept_forever_counts_the_kept_checkpoints_beyond_the_newest(
    every_steps, keep_last, keep_every, total_steps, forever
):
    config = CheckpointConfig(every_steps=every_steps, keep_last=keep_last, keep_every=keep_every)
    assert count_kept_forever(config, total_steps) == forever


def test_a_checkpoint_that_cannot_be_deleted_gives_a_warning_and_no_error(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("step-00000001", "step-00000002")]
    for folder in folders:
        folder.mkdir()
    remove = shutil.rmtree

    def refuse_the_first(folder):
        if folder.name == ".pruned-step-00000001":
            raise OSError(39, "Directory not empty", str(folder))
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", refuse_the_first)
    [line] = prune(folders)
    assert ".pruned-step-00000001 could not be deleted" in line
    assert "delete it by hand" in line
    assert [path.name for path in tmp_path.iterdir()] == [".pruned-step-00000001"]
    [line] = delete([tmp_path / "absent"])
    assert "could not be deleted" in line
