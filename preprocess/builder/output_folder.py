"""The folder of a set while it is built: one builder at a time, what is finished already, and no leftovers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.hashing import file_sha256
from preprocess.atomic import sync_folder
from preprocess.builder.task import Done, ShardTask, same_pictures
from preprocess.images.store import ImageStore
from preprocess.shards.manifest import INDEX, MANIFEST, PROGRESS, REJECTS, TOKENIZER, WORK, Manifest

DIALOGUES, EARLY_REJECTS = "dialogues.jsonl", "rejects.jsonl"  # in the folder of work: what the worklist became
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # as `published` names them
_SHARD = re.compile(r"shard-(\d{5}|[1-9]\d{5,})\.(tar|json)")


def standing(task: ShardTask, compare_pictures: bool = False) -> Done | None:
    """The shard as it was built before, or None if it must be built.

    Its sidecar, written after its tar, says so; no picture that it missed has come or been mended since.
    """
    try:
        sidecar = json.loads(task.sidecar.read_bytes())
        if not _fits(task, sidecar) or (compare_pictures and not same_pictures(task, sidecar)):
            return None
        rejects = Counter(entry["source"] for entry in sidecar["rejects"])
        return Done(task.name, task.range.count, sidecar["samples"], dict(rejects))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fits(task: ShardTask, sidecar: dict[str, Any]) -> bool:
    size = task.tar.stat().st_size if sidecar["samples"] else 0
    if sidecar["spec_sha256"] != task.spec_sha256 or size != sidecar["bytes"]:
        return False
    store = ImageStore(task.root, task.archives)
    return all(store.fingerprint(picture) == stamp for picture, stamp in sidecar["rejected_pictures"].items())


def reusable_manifest(out: Path, spec_sha256: str) -> Manifest | None:
    """The manifest of an earlier build of the same work, if what was written with it still stands."""
    try:
        manifest = Manifest.load(out)
        written = {INDEX: manifest.index, REJECTS: manifest.rejects, TOKENIZER: manifest.tokenizer}
        whole = all(file_sha256(out / name) == about["sha256"] for name, about in written.items())
    except (UserError, OSError):
        return None
    return manifest if whole and manifest.spec_sha256 == spec_sha256 else None


@contextlib.contextmanager
def build_lock(out: Path) -> Iterator[None]:
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
def user_oserrors(out: Path) -> Iterator[None]:
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


def refuse_foreign_files(out: Path) -> None:
    """Raises: UserError if a build would delete or replace what is in the folder, and no build has made it."""
    if not out.is_dir() or (out / WORK).exists() or (out / MANIFEST).exists():
        return
    ours = {INDEX, REJECTS, TOKENIZER, PROGRESS}
    foreign = sorted(path.name for path in out.iterdir() if path.name in ours or path.name.startswith("shard-"))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--out {out} holds {foreign[0]}{more} but neither {MANIFEST} nor {WORK}, so no build has written that and "
            "this one could delete it: give another folder, or remove it yourself"
        )


def remove_manifest(out: Path) -> None:
    """From here on this is an unfinished set, also after a loss of power."""
    (out / MANIFEST).unlink(missing_ok=True)
    sync_folder(out)


def sweep(out: Path) -> None:
    """Removes what killed writers left behind."""
    leftovers = [path for path in out.glob("*.tmp") if _TEMPORARY.fullmatch(path.name)]
    for leftover in [*leftovers, *(out / WORK).glob("*.tmp")]:
        leftover.unlink(missing_ok=True)


def remove_work_files(out: Path) -> None:
    """What only an unfinished set has."""
    sweep(out)
    for path in (out / PROGRESS, out / WORK / DIALOGUES, out / WORK / EARLY_REJECTS):
        path.unlink(missing_ok=True)


def remove_orphans(out: Path, tasks: Sequence[ShardTask]) -> None:
    """Removes shards that are not, or no longer, part of the set. Files that no build writes are left alone."""
    ours = {path for task in tasks for path in (task.tar, task.sidecar)}
    for path in out.glob("shard-*"):
        if _SHARD.fullmatch(path.name) and path not in ours:
            path.unlink()
