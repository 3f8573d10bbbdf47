#!/usr/bin/env python
"""Builds a shard set: annotation files and pictures in, WebDataset tars with a manifest and an index out.

One Ray task builds one shard from a fixed range of dialogues. Every input row ends as exactly one sample or one line of
rejects.jsonl. The same command, run again, builds only what is missing or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from model.config import EmmaConfig, preset
from model.errors import UserError
from preprocess.finalise import Finished, finalise
from preprocess.mix import Mix, load_mix
from preprocess.pictures import PictureStore
from preprocess.progress import LOG_EVERY_S, Progress
from preprocess.prompts import Tokenizer, load_tokenizer
from preprocess.shards import MANIFEST, PROGRESS, REJECTS, TOKENIZER, WORK, Manifest, canonical_json, publish, published
from preprocess.task import Settings, ShardTask, build_shard
from preprocess.worklist import Worklist, make_worklist, refuse_missing_folders, row_count_notes

BUILDER = 1  # raise it when the same input must give other bytes: every shard is then built again
PAPER_MIX = Path("preprocess/mixes/emma_1m2.toml")
SAMPLES_PER_SHARD = 4096
DIALOGUES = "dialogues.jsonl"
EXIT_USER_ERROR, EXIT_TOO_MANY_REJECTS = 2, 3

EXAMPLES = """examples:
  preprocess/build_shards.py preprocess/mixes/emma_1m2.toml --model emma_v2 --root /data/raw --out /data/shards
  preprocess/build_shards.py my.toml --model tiny_v2 --root raw --out shards --tokenizer my_tokenizer --dry-run
  ray job submit --working-dir . -- python preprocess/build_shards.py MIX.toml --model emma_v2 --root /… --out /…

Uses the Ray cluster that RAY_ADDRESS names, as it does in a Ray job; otherwise starts its own on this machine. --root
and --out must be the same place on every node. A picture that is replaced under the same name is not noticed: delete
the shards, or build into a new folder.

exit codes: 0 done, 2 a mistake of the user's (one line says which), 3 too many rejects, else a crash
"""


class TooManyRejectsError(UserError):
    """A source lost more of its rows than `--max-reject-ratio` allows."""


@dataclass(frozen=True)
class Build:
    """One checked request: everything that can be wrong before work starts has been looked at."""

    mix: Mix
    config: EmmaConfig
    tokenizer: Tokenizer
    root: Path
    out: Path
    samples_per_shard: int
    workers: int | None
    max_reject_ratio: float

    @property
    def settings(self) -> Settings:
        return Settings(
            self.config.template,
            self.tokenizer.sha256,
            self.config.vision.image_px,
            self.mix.encoding,
            self.config.max_text_tokens,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        build = check(parsed)
        if parsed.dry_run:
            dry_run(build)
        else:
            run(build)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_TOO_MANY_REJECTS if isinstance(error, TooManyRejectsError) else EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "(default %(default)s)"
    parser.add_argument("mix", type=Path, nargs="?", default=PAPER_MIX, help=f"TOML that names the sources {default}")
    parser.add_argument("--model", default="emma_v2", help=f"preset: template, picture size, limit of text {default}")
    parser.add_argument(
        "--root", type=Path, default=Path("data/raw"), help=f"where annotations and pictures lie {default}"
    )
    parser.add_argument("--out", type=Path, default=Path("data/shards"), help=f"folder of the shard set {default}")
    parser.add_argument(
        "--tokenizer", help="hub id, or folder with a tokenizer.json; before the mix's and the preset's"
    )
    parser.add_argument("--max-reject-ratio", type=float, default=0.01, help=f"per source {default}")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help=default)
    parser.add_argument(
        "--workers", type=int, help="tasks at a time (default: one per CPU; 0: in this process, without Ray)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be built, and write nothing")
    return parser


# -- Before any work starts ------------------------------------------------------------------------------------------


def check(parsed: argparse.Namespace) -> Build:
    """Raises: UserError."""
    try:
        config = preset(parsed.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_range("--max-reject-ratio", parsed.max_reject_ratio, 0, 1)
    _check_range("--samples-per-shard", parsed.samples_per_shard, 1, 1_000_000)
    if parsed.workers is not None:
        _check_range("--workers", parsed.workers, 0, 1_000_000)
    _refuse_lost_paths(parsed)
    mix = load_mix(parsed.mix)
    root = parsed.root.absolute()
    _check_root(mix, root)
    tokenizer = _find_tokenizer(parsed, mix, config)
    return Build(
        mix,
        config,
        tokenizer,
        root,
        parsed.out.absolute(),
        parsed.samples_per_shard,
        parsed.workers,
        parsed.max_reject_ratio,
    )


def _check_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{option} is {value}, expected a number from {low} to {high}")


def _refuse_lost_paths(parsed: argparse.Namespace) -> None:
    """A job that was submitted with --working-dir runs in a copy of it that Ray throws away."""
    if "/runtime_resources/working_dir_files/" in str(Path.cwd()):
        for option, path in (("--root", parsed.root), ("--out", parsed.out)):
            if not path.is_absolute():
                raise UserError(
                    f"{option} {path} is relative, and this job runs in a temporary copy: give the whole path"
                )


def _check_root(mix: Mix, root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"--root {root} is no folder; it must hold the annotations and pictures that the mix names")
    store = PictureStore(root, mix.archives)
    for source in mix.sources:
        if not (root / source.annotations).is_file():
            raise UserError(f"source {source.name!r}: annotation file {root / source.annotations} is missing")
        if not store.has_folder(source.images or "."):
            raise UserError(f"source {source.name!r}: picture folder {root / source.images} is missing")


def _find_tokenizer(parsed: argparse.Namespace, mix: Mix, config: EmmaConfig) -> Tokenizer:
    name = parsed.tokenizer or mix.tokenizer or config.tokenizer
    if name is None:
        raise UserError(
            f"preset {config.name} has no tokenizer of its own: give --tokenizer, or `tokenizer` in the mix"
        )
    tokenizer = load_tokenizer(name)
    rows = config.llm.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer {name} has ids up to {tokenizer.vocab_size - 1}, preset {config.name} embeds {rows}: "
            "choose a smaller tokenizer or another preset"
        )
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(f"tokenizer {name} has {tokenizer.vocab_size} ids; shards keep 16 bits per token")
    return tokenizer


# -- The work --------------------------------------------------------------------------------------------------------


def dry_run(build: Build) -> None:
    work = make_worklist(build.mix, build.root, build.samples_per_shard, len, _row_teller())
    refuse_missing_folders(work, PictureStore(build.root, build.mix.archives), build.max_reject_ratio)
    tasks = plan(build, work)
    missing = [task for task in tasks if not is_built(task)]
    print(f"{work.rows.total()} rows, {len(work.rejects)} of them rejected before their pictures are looked at")
    print(f"{len(tasks)} shards of {work.dialogues} dialogues, {len(missing)} of them to be built in {build.out}")


def run(build: Build) -> Manifest:
    with _io_errors_explained(build.out), _only_builder_of(build.out):
        sweep(build.out)
        work = _write_worklist(build)
        tasks = plan(build, work)
        missing = [task for task in tasks if not is_built(task)]
        spec_sha256 = _sha256([task.spec_sha256 for task in tasks])
        if not missing and (manifest := _standing_manifest(build, spec_sha256)):
            clear_scaffold(build.out)
            print(f"{build.out} is up to date: {_summary(manifest)}", flush=True)
            return manifest
        (build.out / MANIFEST).unlink(missing_ok=True)  # from here on, and until the end, this is not a set
        remove_strangers(build.out, tasks)
        publish(build.out / TOKENIZER, build.tokenizer.data)
        progress = Progress(build.out, work.dialogues, sum(task.range.count for task in tasks if task not in missing))
        build_here(missing, progress) if build.workers == 0 else build_on_ray(missing, build.workers, progress)
        about = Finished(build.config.name, build.settings, build.tokenizer, work.rows, work.rejects, spec_sha256)
        manifest = finalise(build.out, tasks, about, lambda rejects: _refuse_too_many(build, rejects, work.rows))
        clear_scaffold(build.out)
        print(f"{build.out}: {_summary(manifest)}", flush=True)
        return manifest


def _write_worklist(build: Build) -> Worklist:
    with published(build.out / WORK / DIALOGUES) as file:
        work = make_worklist(build.mix, build.root, build.samples_per_shard, file.write, _row_teller())
    for note in row_count_notes(build.mix.sources, work.rows):
        print(note, flush=True)
    refuse_missing_folders(work, PictureStore(build.root, build.mix.archives), build.max_reject_ratio)
    return work


def plan(build: Build, work: Worklist) -> list[ShardTask]:
    """The same list for the same input and settings, whatever is built already."""
    settings = build.settings
    return [
        ShardTask(
            name=f"shard-{number:05d}",
            spec_sha256=_sha256([BUILDER, asdict(settings), part.first, part.sha256]),
            range=part,
            settings=settings,
            dialogues=build.out / WORK / DIALOGUES,
            tokenizer=build.out / TOKENIZER,
            root=build.root,
            archives=build.mix.archives,
        )
        for number, part in enumerate(work.ranges)
    ]


def is_built(task: ShardTask) -> bool:
    """Its sidecar, written after its tar, says so; and no picture that it missed has come since."""
    try:
        sidecar = json.loads(task.sidecar.read_bytes())
        size = task.tar.stat().st_size if sidecar["samples"] else 0
        if sidecar["spec_sha256"] != task.spec_sha256 or size != sidecar["bytes"]:
            return False
        store = PictureStore(task.root, task.archives)
        return all(store.stamp(picture) == stamp for picture, stamp in sidecar["rejected_pictures"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_here(tasks: Sequence[ShardTask], progress: Progress) -> None:
    for task in tasks:
        finished = build_shard(task)
        progress.add(finished.dialogues, finished.rejects)
        progress.tick()
    progress.tick("finalising", last=True)


def build_on_ray(tasks: Sequence[ShardTask], workers: int | None, progress: Progress) -> None:
    """At most two tasks per CPU are in flight; OSErrors are retried by Ray, crashes of a worker too."""
    if not tasks:
        return
    with _cluster(workers):
        cpus = int(ray.cluster_resources().get("CPU", 1))
        remote = ray.remote(build_shard).options(max_retries=3, retry_exceptions=[OSError])
        waiting = list(reversed(tasks))
        flying: list[ray.ObjectRef] = []
        progress.tick()
        while waiting or flying:
            while waiting and len(flying) < min(2 * cpus, workers or 2 * cpus):
                flying.append(remote.remote(waiting.pop()))
            landed, flying = ray.wait(flying, timeout=1.0)
            for finished in ray.get(landed):
                progress.add(finished.dialogues, finished.rejects)
            progress.tick()
        progress.tick("finalising", last=True)


@contextlib.contextmanager
def _cluster(workers: int | None) -> Iterator[None]:
    """The cluster that we are in, or one of our own that ends with us."""
    ours = not ray.is_initialized()
    if ours and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
    elif ours:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, logging_level="warning")
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


# -- Keeping the folder in order -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_builder_of(out: Path) -> Iterator[None]:
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
def _io_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = getattr(error, "cause", error)
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for {out}; what is finished is kept: make room and run again") from None
        if cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"--out {out} cannot be written: {cause.strerror}; choose another folder") from None
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


# -- What is said ----------------------------------------------------------------------------------------------------


def _standing_manifest(build: Build, spec_sha256: str) -> Manifest | None:
    try:
        manifest = Manifest.load(build.out)
    except UserError:
        return None
    return manifest if manifest.spec_sha256 == spec_sha256 else None


def _refuse_too_many(build: Build, rejects: Counter[str], rows: Counter[str]) -> None:
    _print_rejects(build.out / REJECTS)
    lost = {name: rejects[name] / rows[name] for name in rejects}
    worst = {name: ratio for name, ratio in lost.items() if ratio > build.max_reject_ratio}
    if worst:
        listed = ", ".join(
            f"{name} {ratio:.2%} ({rejects[name]} of {rows[name]} rows)" for name, ratio in worst.items()
        )
        raise TooManyRejectsError(
            f"more rows were rejected than --max-reject-ratio {build.max_reject_ratio} allows: {listed}; "
            f"{build.out / REJECTS} says why; mend the data, or raise the ratio, and run again"
        )


def _print_rejects(path: Path) -> None:
    with path.open() as lines:
        reasons = Counter((entry["source"], entry["reason"]) for entry in map(json.loads, lines))
    for (source, reason), count in sorted(reasons.items()):
        print(f"  rejected {count:>7}  {source}: {reason}", flush=True)


def _summary(manifest: Manifest) -> str:
    counts = manifest.counts
    return (
        f"{counts['samples']} samples in {len(manifest.shards)} shards, {counts['rejects']} of {counts['rows']} rows "
        f"rejected, {counts['pictures']} pictures, {counts['text_tokens']} text tokens; set {manifest.sha256[:12]}"
    )


def _row_teller() -> Callable[[int], None]:
    told = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal told
        if time.monotonic() - told >= LOG_EVERY_S:
            told = time.monotonic()
            print(f"{rows} rows read", flush=True)

    return tell


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
