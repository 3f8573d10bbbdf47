"""The output folder of a build: locking it, reusing finished shards and manifests, and removing stale files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError, oserror_remedy, oserror_text
from model.hashing import file_sha256
from preprocess.annotations.worklist import Worklist
from preprocess.atomic import sync_folder
from preprocess.builder.plan import earlier_specs, set_spec_sha256
from preprocess.builder.request import BuildRequest
from preprocess.builder.task import ShardResult, ShardTask, same_images
from preprocess.images.store import ImageStore
from preprocess.shards.folder import INDEX, MANIFEST, PROGRESS, REJECTS, TOKENIZER, WORK, ShardFolder
from preprocess.shards.manifest import Manifest

_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # names that `published` gives to temporary files
_SHARD = re.compile(r"(?P<name>shard-(\d{5}|[1-9]\d{5,}))\.(tar|json)")


@contextlib.contextmanager
def build_lock(folder: ShardFolder) -> Iterator[None]:
    """Lock the folder for this process, and create the folder if needed.

    The operating system releases the lock if the process dies.

    Raises: UserError if another process is building into the folder.
    """
    folder.work.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another build_shards.py is building into {folder}; wait until it ends, or stop it"
            ) from None
        except OSError:
            print(f"note: the file system of {folder} has no locks: run one build at a time", flush=True)
        yield


@contextlib.contextmanager
def user_oserrors(path: Path, then: str = "run the same command again") -> Iterator[None]:
    """Raise a UserError for each OSError that the user can fix, such as a full disk.

    Args:
        path: path that the message names if the error names no file.
        then: advice on what to do after the cause is fixed.
    """
    try:
        yield
    except OSError as error:
        # EEXIST is not in the shared table of remedies, because in training it is caused by races between ranks in
        # shared caches, which the user cannot fix.
        if remedy := oserror_remedy(error) or ("check the path" if error.errno == errno.EEXIST else None):
            raise UserError(f"{oserror_text(error, path)}; {remedy}, then {then}") from None
        raise


def refuse_foreign_files(folder: ShardFolder) -> None:
    """Raise UserError if the folder holds files that a build would replace, but that no build has written."""
    if not folder.path.is_dir() or folder.work.exists() or folder.manifest.exists():
        return
    ours = {INDEX, REJECTS, TOKENIZER, PROGRESS}
    foreign = sorted(path.name for path in folder.path.iterdir() if path.name in ours or path.name.startswith("shard-"))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--out {folder} holds {foreign[0]}{more} but neither {MANIFEST} nor {WORK}, so no build has written these "
            "files, and this build could delete them. Give another folder, or delete them yourself"
        )


# -- Reuse -----------------------------------------------------------------------------------------------------------


def reusable_shard(task: ShardTask, *, compare_images: bool = False) -> ShardResult | None:
    """Return the result of a finished shard, or None if the shard must be built.

    A shard is reused if its sidecar has the task's `spec_sha256`, its tar has the size that the sidecar names, and each
    rejected image is still missing or has the same bytes. With `compare_images`, each accepted image must also have the
    same file size.
    """
    try:
        sidecar = json.loads(task.sidecar.read_bytes())
        if not _is_current(task, sidecar) or (compare_images and not same_images(task, sidecar)):
            return None
        rejects = Counter(entry["source"] for entry in sidecar["rejects"])
        return ShardResult(
            name=task.name, dialogues=task.range.count, samples=sidecar["samples"], rejects=dict(rejects)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def earlier_version_note(folder: ShardFolder, tasks: Sequence[ShardTask]) -> Iterator[str]:
    """Yield a note if shards differ from the tasks only in the version of the builder."""
    earlier = sum(_read_spec(task) in earlier_specs(task) for task in tasks)
    if earlier:
        yield (
            f"note: {earlier} of {len(tasks)} shards in {folder} were built by an earlier version, and a build "
            "replaces them: see CHANGELOG.md for what changes. A training on the old shards cannot continue on the "
            "new ones; give another --out to keep the old shards"
        )


def _read_spec(task: ShardTask) -> str | None:
    try:
        return json.loads(task.sidecar.read_bytes())["spec_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_current(task: ShardTask, sidecar: dict[str, Any]) -> bool:
    size = task.tar.stat().st_size if sidecar["samples"] else 0
    if sidecar["spec_sha256"] != task.spec_sha256 or size != sidecar["bytes"]:
        return False
    store = ImageStore(task.root, task.archives)
    return all(store.fingerprint(image) == stamp for image, stamp in sidecar["rejected_pictures"].items())


def reusable_manifest(request: BuildRequest, work: Worklist, tasks: Sequence[ShardTask]) -> Manifest | None:
    """Return the manifest of a finished set if the request would build the same set again, otherwise None.

    Call this only if every shard can be reused.
    The details of rejects are not compared, because their wording may change between versions.
    """
    folder = request.folder
    try:
        manifest = Manifest.load(folder)
        hashed = {folder.index: manifest.index, folder.rejects: manifest.rejects, folder.tokenizer: manifest.tokenizer}
        if any(file_sha256(path) != about["sha256"] for path, about in hashed.items()):
            return None
        early_rejects_sha256 = _published_early_rejects_sha256(folder)
    except (UserError, OSError):
        return None
    return manifest if manifest.spec_sha256 == set_spec_sha256(request, work, tasks, early_rejects_sha256) else None


def _published_early_rejects_sha256(folder: ShardFolder) -> str:
    """Hash the lines of rejects.jsonl that have the same source, row, id and reason as the early rejects.

    The manifest's `spec_sha256` depends on the early rejects, including their details as they were worded when the set
    was built. Only rejects.jsonl still has this wording. Both files are ordered by source and row, so one pass over
    them finds all lines.
    """
    hashed = hashlib.sha256()
    with folder.early_rejects.open("rb") as early, folder.rejects.open("rb") as published:
        for line in early:
            wanted = _without_wording(line)
            hashed.update(next((candidate for candidate in published if _without_wording(candidate) == wanted), b"\n"))
    return hashed.hexdigest()


def _without_wording(line: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if name != "detail"}


# -- Removal ---------------------------------------------------------------------------------------------------------


def remove_manifest(folder: ShardFolder) -> None:
    """Remove the manifest and sync the folder, so that the set counts as unfinished even after a power failure."""
    folder.manifest.unlink(missing_ok=True)
    sync_folder(folder.path)


def remove_leftovers(folder: ShardFolder) -> None:
    """Remove temporary files that killed builds have left behind."""
    for path in folder.path.glob("*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for path in folder.work.glob("*.tmp"):
        path.unlink(missing_ok=True)


def remove_work_files(folder: ShardFolder) -> None:
    """Remove the files that only an unfinished set needs. The lock file stays."""
    remove_leftovers(folder)
    for path in (folder.progress, folder.dialogues, folder.early_rejects):
        path.unlink(missing_ok=True)


def remove_orphans(folder: ShardFolder, shards: Collection[str]) -> None:
    """Remove tars and sidecars of shards that are not in `shards`. Keep files with other names."""
    for path in folder.path.glob("shard-*"):
        if (match := _SHARD.fullmatch(path.name)) and match["name"] not in shards:
            path.unlink()
