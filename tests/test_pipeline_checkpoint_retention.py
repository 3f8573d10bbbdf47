"""Which checkpoints stay, and deletions that fail."""

import shutil

import pytest

from pipeline.checkpoint.retention import delete, kept, prune

GOOD_AND_OLD = [6, 8, 10, 12]


@pytest.mark.parametrize(
    ("good", "keep_last", "keep_every", "room", "stay"),
    [
        ({6, 8, 10, 12}, 2, 0, True, {10, 12}),
        ({6, 8, 10, 12}, 2, 8, True, {8, 10, 12}),  # for ever
        ({10, 12}, 3, 0, True, {6, 8, 10, 12}),  # 6 or 8 may be damaged: neither is deleted for the other
        ({10, 12}, 3, 0, False, {8, 10, 12}),  # without room for the next save the oldest goes all the same
        ({12}, 2, 0, True, {8, 10, 12}),
        ({8, 10, 12}, 3, 0, True, {8, 10, 12}),
        ({12}, 1, 6, True, {6, 12}),
    ],
)
def test_a_checkpoint_that_nobody_verified_never_takes_the_place_of_a_good_one(good, keep_last, keep_every, room, stay):
    assert kept(GOOD_AND_OLD, good, keep_last, keep_every, room) == stay


def test_starts_that_save_once_each_do_not_pile_checkpoints_up():
    steps = {1}
    for step in range(2, 30):
        steps = kept([*steps, step], good={step - 1, step}, keep_last=3, keep_every=0, room=True)
    assert steps == {25, 26, 27, 28, 29}


def test_what_will_not_be_deleted_is_told_and_ends_nothing(tmp_path, monkeypatch):
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
