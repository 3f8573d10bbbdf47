"""Training launches in one run folder, each interrupted at a different stage of a checkpoint save.

    python -m tests.programs.killed_training STAGE,STAGE,… RECIPE [key=value …]

Each stage is one launch in a fork of this process, which has imported all modules and started no thread. A method of
`Stages` kills the launch with SIGKILL. A method of `Failures` makes the file system fail, after which the launch must
exit with the retry code. A last launch without a stage trains to the end.

Under torchrun there is only one launch and one stage: the first rank that reaches the stage is killed.
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

FATAL_SAVE = 2  # number of the save (1 is the first) in which a launch is killed or its file system fails


class Stages:
    """Each method makes this process kill itself at one stage of save number FATAL_SAVE."""

    @staticmethod
    def snapshot_taken():
        die_before(Snapshot, "write", lambda *_: True)

    @staticmethod
    def half_written():
        die_before(pipeline.checkpoint.snapshot, "sync", lambda *_: True)

    @staticmethod
    def written():
        die_before(Layout, "save", lambda *_: True)

    @staticmethod
    def manifest_written():
        die_before(Path, "rename", lambda path, *_: path.name.startswith(".partial-"))

    @staticmethod
    def renamed():
        die_before(pipeline.checkpoint.saver, "sync_folder", lambda folder: folder.name == "checkpoints")

    @staticmethod
    def before_latest():
        die_before(pipeline.checkpoint.saver, "publish", lambda path, _: path.name == "latest")

    @staticmethod
    def pruning():
        die_before(shutil, "rmtree", lambda path, **_: path.name.startswith(".pruned-"))


class Failures:
    """Each method makes one kind of file system call fail."""

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


def fail(owner, name, error_number, *, saves_before):
    """Make `owner.name` raise OSError with this errno once `saves_before` saves have been started."""
    original = getattr(owner, name)

    def failing(*arguments):
        if saves == saves_before:
            raise OSError(error_number, os.strerror(error_number))
        return original(*arguments)

    setattr(owner, name, failing)


def die_before(owner, name, matches):
    """Make `owner.name` kill this process during save number FATAL_SAVE if the arguments match."""
    original = getattr(owner, name)

    def fatal(*arguments, **options):
        if saves == FATAL_SAVE and matches(*arguments, **options):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, fatal)


def count_saves():
    """Count the saves in `saves`, and finish each save before the next one starts."""
    save = Saver.save

    def counted(self, step):
        global saves
        self.finish()
        saves += 1
        return save(self, step)

    setattr(Saver, "save", counted)  # noqa: B010 (mypy refuses the assignment)


def train_until(stage, arguments):
    """Train in this process until it is interrupted at the stage, or to the end if `stage` is None."""
    sys.argv = ["pipeline.train", *arguments]
    count_saves()
    if stage:
        getattr(Failures if hasattr(Failures, stage) else Stages, stage)()
    train.main()


def fork_and_train(stage, arguments):
    """Train in a fork of this process. Return the exit code of the fork."""
    pid = os.fork()
    if pid == 0:
        train_until(stage, arguments)
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(stages, arguments):
    for stage in stages:
        expected = ExitCode.RETRY if hasattr(Failures, stage) else -signal.SIGKILL
        code = fork_and_train(stage, arguments)
        assert code == expected, f"{stage}: ended with {code}"
        print(f"survived: {stage}", flush=True)
    assert fork_and_train(None, arguments) == 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_until(sys.argv[1], sys.argv[2:])
    else:
        main(sys.argv[1].split(","), sys.argv[2:])
