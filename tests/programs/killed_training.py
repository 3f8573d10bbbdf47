"""Run by the tests: one training after the other in the same run folder, each killed in another stage of a save.

killed_program.py STAGE,STAGE,… RECIPE [key=value …]: after the last stage the training is left alone until its end.
A stage may also be one in which the file system fails: that life must end by itself, to be tried again.
Each is a process of its own, forked from this one, which has imported everything and started nothing. Under torchrun
there is one life, of the one stage that is named: the first rank that comes there dies.
"""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pipeline.checkpoint.saver
import pipeline.checkpoint.snapshot
import pipeline.checkpoint.verify
from model.errors import ExitCode
from pipeline import train
from pipeline.checkpoint.layout import Layout
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.snapshot import Snapshot
from pipeline.engine import init_distributed  # noqa: F401  (imported before the fork)

FATAL_SAVE = 2  # the save of a life that does not survive


class Stages:
    """Each method has a stage of the second save end this process, as `kill -9` would."""

    @staticmethod
    def snapshot_taken():
        before(Snapshot, "write", lambda *_: True)

    @staticmethod
    def half_written():
        before(pipeline.checkpoint.snapshot, "sync", lambda *_: True)

    @staticmethod
    def written():
        before(Layout, "save", lambda *_: True)

    @staticmethod
    def manifest_written():
        before(Path, "rename", lambda path, *_: path.name.startswith(".partial-"))

    @staticmethod
    def renamed():
        before(pipeline.checkpoint.saver, "sync_folder", lambda folder: folder.name == "checkpoints")

    @staticmethod
    def before_latest():
        before(pipeline.checkpoint.saver, "publish", lambda path, _: path.name == "latest")

    @staticmethod
    def pruning():
        before(shutil, "rmtree", lambda path, **_: path.name.startswith(".pruned-"))


class Failures:
    """Each method has the file system fail, in one call after the other."""

    @staticmethod
    def hashing_fails():
        fail(pipeline.checkpoint.verify, "file_sha256", errno.ESTALE, saves_before=0)

    @staticmethod
    def loading_fails():
        fail(pipeline.checkpoint.verify, "read_and_hash", errno.EIO, saves_before=0)

    @staticmethod
    def writing_fails():
        fail(pipeline.checkpoint.snapshot, "sync", errno.ETIMEDOUT, saves_before=FATAL_SAVE)


saves = 0


def fail(owner, name, number, saves_before):
    called = getattr(owner, name)

    def failing(*arguments):
        if saves == saves_before:
            raise OSError(number, os.strerror(number))
        return called(*arguments)

    setattr(owner, name, failing)


def before(owner, name, is_it):
    """Die instead of calling `owner.name` with arguments that are meant, in the second save."""
    called = getattr(owner, name)

    def fatal(*arguments, **options):
        if saves == FATAL_SAVE and is_it(*arguments, **options):
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **options)

    setattr(owner, name, fatal)


def count_saves():
    save = Saver.save

    def counted(self, step):
        global saves
        self.finish()
        saves += 1
        return save(self, step)

    setattr(Saver, "save", counted)  # noqa: B010 (the type checker minds the other way)


def live(stage, words):
    """One life; its exit status."""
    pid = os.fork()
    if pid == 0:
        train_until(stage, words)
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def train_until(stage, words):
    sys.argv = ["pipeline.train", *words]
    count_saves()
    if stage:
        getattr(Failures if hasattr(Failures, stage) else Stages, stage)()
    train.main()


def live_and_die(stages, words):
    for stage in stages:
        expected = ExitCode.RETRY if hasattr(Failures, stage) else -signal.SIGKILL
        code = os.waitstatus_to_exitcode(live(stage, words))
        assert code == expected, f"{stage}: ended with {code}"
        print(f"survived: {stage}", flush=True)
    assert live(None, words) == 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_until(sys.argv[1], sys.argv[2:])
    else:
        live_and_die(sys.argv[1].split(","), sys.argv[2:])
