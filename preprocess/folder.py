"""The folder of a set while it is built: one builder at a time, what is finished already, and no leftovers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import UserError
from preprocess.pictures import PictureStore
from preprocess.shards import INDEX, PROGRESS, REJECTS, TOKENIZER, WORK, Manifest, file_sha256
from preprocess.task import ShardTask, same_pictures

DIALOGUES = "dialogues.jsonl"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def is_built(task: ShardTask, compare_pictures: bool = False) -> bool:
    """Its sidecar, written after its tar, says so; no picture that it missed has come or been mended since."""
    try:
        sidecar = json.loads(task.sidecar.read_bytes())
        size = task.tar.stat().st_size if sidecar["samples"] else 0
        if sidecar["spec_sha256"] != task.spec_sha256 or size != sidecar["bytes"]:
            return False
        if compare_pictures and not same_pictures(task, sidecar):
            return False
        store = PictureStore(task.root, task.archives)
        return all(store.stamp(picture) == stamp for picture, stamp in sidecar["rejected_pictures"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def standing_manifest(out: Path, spec_sha256: str) -> Manifest | None:
    """The manifest of an earlier build of the same work, if what was written with it still stands."""
    try:
        manifest = Manifest.load(out)
        written = {INDEX: manifest.index, REJECTS: manifest.rejects, TOKENIZER: manifest.tokenizer}
        whole = all(file_sha256(out / name) == about["sha256"] for name, about in written.items())
    except (UserError, OSError):
        return None
    return manifest if whole and manifest.spec_sha256 == spec_sha256 else None


@contextlib.contextmanager
def only_builder_of(out: Path) -> Iterator[None]:
    """Raises: UserError if another process builds into the folder. The lock ends with its process."""
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another build_shards.py is building into {out}; wait for it, or stop it") from None
        except OSError:
            print(f"note: {out} cannot be locked on this file system: run one build at a time", flush=True)
        yield


@contextlib.contextmanager
def io_errors_explained(out: Path) -> Iterator[None]:
    """Turns what is the user's business, the disk full or closed to us, into a UserError; Ray hides it in `cause`."""
    try:
        yield
    except OSError as error:
        cause = getattr(error, "cause", error)
        if cause.errno in _NO_SPACE:
            raise UserError(f"no space left for {out}; what is finished is kept: make room and run again") from None
        if cause.errno in _NO_ACCESS:
            raise UserError(f"{cause.filename or out} cannot be used: {cause.strerror}") from None
        raise


def sweep(out: Path) -> None:
    """Removes what killed writers left behind."""
    for folder in (out, out / WORK):
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)


def clear_scaffold(out: Path) -> None:
    """What only an unfinished set has."""
    sweep(out)
    for path in (out / PROGRESS, out / WORK / DIALOGUES):
        path.unlink(missing_ok=True)


def remove_strangers(out: Path, tasks: Sequence[ShardTask]) -> None:
    """Removes shards that are not, or no longer, part of the set. Files that no build writes are left alone."""
    ours = {path for task in tasks for path in (task.tar, task.sidecar)}
    for path in [*out.glob("shard-*.tar"), *out.glob("shard-*.json")]:
        if path not in ours:
            path.unlink()
