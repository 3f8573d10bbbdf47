#!/usr/bin/env python
"""Builds a shard set: annotation files and pictures in, WebDataset tars with a manifest and an index out.

One Ray task builds one shard from a fixed range of dialogues. Every input row ends as exactly one sample or one line of
rejects.jsonl. The same command, run again, builds only what is missing or differs.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from model.errors import UserError
from model.hashing import file_sha256
from preprocess.annotations.worklist import Worklist, check_feasible, make_worklist, row_count_notes
from preprocess.atomic import canonical_json, publish, published
from preprocess.builder.finalise import Facts, finalise
from preprocess.builder.output_folder import (
    DIALOGUES,
    EARLY_REJECTS,
    build_lock,
    refuse_foreign_files,
    remove_manifest,
    remove_orphans,
    remove_work_files,
    reusable_manifest,
    standing,
    sweep,
    user_oserrors,
)
from preprocess.builder.request import Build, check
from preprocess.builder.sigterm import Terminated, sigterm_raises
from preprocess.builder.survey import Survey
from preprocess.builder.task import Done, ShardTask, build_shard
from preprocess.images.store import ImageStore
from preprocess.progress import LOG_EVERY_S, Progress
from preprocess.rejects import (
    RejectCounts,
    TooManyRejectsError,
    count_by_source,
    count_rejects,
    sources_over_limit,
    summary_lines,
)
from preprocess.remote_path import parse_path
from preprocess.shards.manifest import REJECTS, TOKENIZER, WORK, Manifest

BUILDER = 4  # raise it when the same input must give other bytes: every shard is then built again
PAPER_MIX = Path("preprocess/mixes/emma_1m2.toml")
SAMPLES_PER_SHARD = 4096
EXIT_USER_ERROR, EXIT_TOO_MANY_REJECTS, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 3, 130, 143

EXAMPLES = """examples:
  preprocess/build_shards.py preprocess/mixes/emma_1m2.toml --model emma_v2 --root /data/raw --out /data/shards
  preprocess/build_shards.py my.toml --model tiny_v2 --root raw --out shards --tokenizer my_tokenizer --check
  ray job submit --working-dir . -- python preprocess/build_shards.py MIX.toml --model emma_v2 --root /… --out /…

Uses the Ray cluster that RAY_ADDRESS names, as it does in a Ray job; otherwise starts its own on this machine. --root
and --out must be the same place on every node. The next run notices a picture that has come, or a bad one that was
mended; that a good one was replaced, only with --compare-pictures, which asks for the size of every picture.

exit codes: 0 done, 2 a mistake of the user's (one line says which), 3 too many rejects, 130 stopped by Ctrl-C or
143 by SIGTERM (what is finished is kept, and the same command goes on from there), anything else a crash
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    try:
        with sigterm_raises(), user_oserrors(parsed.out):
            build = check(parsed)
            if parsed.check:
                look(build)
            else:
                run(build)
    except UserError as error:
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr, flush=True)  # Ray adds a traceback
        return EXIT_TOO_MANY_REJECTS if isinstance(error, TooManyRejectsError) else EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        print("stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "(default %(default)s)"
    parser.add_argument("mix", type=Path, nargs="?", default=PAPER_MIX, help=f"TOML that names the sources {default}")
    parser.add_argument("--model", default="emma_v2", help=f"preset: template, picture size, limit of text {default}")
    parser.add_argument(
        "--root",
        type=parse_path,
        default="data/raw",
        help=f"folder or URL (s3://…) of annotations and pictures {default}",
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
    parser.add_argument(
        "--compare-pictures",
        action="store_true",
        help="also build the shards again that have a picture of another size",
    )
    parser.add_argument(
        "--check",
        "--dry-run",
        action="store_true",
        help="read every row and a few pictures of each source, say what would be built, write nothing",
    )
    return parser.parse_args(arguments)


# -- The work --------------------------------------------------------------------------------------------------------


def look(build: Build) -> None:
    """Reads every row and a few pictures of each source. Raises: UserError for what would stop a build."""
    refuse_foreign_files(build.out)
    survey, store = Survey(), ImageStore(build.root, build.mix.archives)
    work = make_worklist(
        build.mix,
        build.root,
        samples_per_shard=build.samples_per_shard,
        write=survey.write,
        on_rows=_row_teller(),
    )
    notes = row_count_notes(build.mix, work)
    for line in [*survey.report(build.mix, work, store), *notes, *summary_lines(work.rejects)]:
        print(line, flush=True)
    check_feasible(work, store, build.max_reject_ratio)
    _refuse_too_many(build, work.rejects, work.rows, "a build would write down which, before any picture is read")
    tasks = plan(build, work)
    missing = [task for task in tasks if not standing(task)]
    print(f"{len(tasks)} shards of {work.dialogues} dialogues, {len(missing)} of them to be built in {build.out}")


def run(build: Build) -> Manifest:
    """Raises: UserError; TooManyRejectsError after rejects.jsonl has been published, and the manifest withdrawn."""
    refuse_foreign_files(build.out)
    with build_lock(build.out):
        sweep(build.out)
        try:
            manifest, state = _standing_or_built(build, _write_worklist(build))
        except TooManyRejectsError:
            remove_manifest(build.out)
            raise
        remove_work_files(build.out)
        if len(manifest.made_with) > 1:
            print(_mixture(manifest), flush=True)
        print(f"{build.out} {state}: {_summary(manifest)}", flush=True)
        return manifest


def _write_worklist(build: Build) -> Worklist:
    rejects = build.out / WORK / EARLY_REJECTS
    with published(build.out / WORK / DIALOGUES) as dialogues, published(rejects) as early:
        work = make_worklist(
            build.mix,
            build.root,
            samples_per_shard=build.samples_per_shard,
            write=dialogues.write,
            on_rows=_row_teller(),
            write_reject=early.write,
        )
    for note in row_count_notes(build.mix, work):
        print(note, flush=True)
    check_feasible(work, ImageStore(build.root, build.mix.archives), build.max_reject_ratio)
    return work


def _standing_or_built(build: Build, work: Worklist) -> tuple[Manifest, str]:
    """Raises: TooManyRejectsError."""
    _refuse_early(build, work)
    tasks = plan(build, work)
    found = {task.name: standing(task, build.compare_pictures) for task in tasks}
    facts = _facts(build, work, tasks)
    manifest = reusable_manifest(build.out, facts.spec_sha256) if all(found.values()) else None
    if not manifest:
        return _build_set(build, tasks, [done for done in found.values() if done], work, facts), "is built"
    _judge(build, count_rejects(build.out / REJECTS), work.rows)
    return manifest, "is up to date"


def _refuse_early(build: Build, work: Worklist) -> None:
    """What is lost already is enough to fail: no picture need be read."""
    if sources_over_limit(work.rejects, work.rows, build.max_reject_ratio):
        remove_manifest(build.out)  # it names the rejects that are replaced now
        with (build.out / WORK / EARLY_REJECTS).open("rb") as lines, published(build.out / REJECTS) as file:
            shutil.copyfileobj(lines, file)
        _judge(build, work.rejects, work.rows)


def _build_set(
    build: Build, tasks: Sequence[ShardTask], found: Sequence[Done], work: Worklist, facts: Facts
) -> Manifest:
    remove_manifest(build.out)  # until the end
    remove_orphans(build.out, tasks)
    publish(build.out / TOKENIZER, build.tokenizer.data)
    rejects = sum((Counter(done.rejects) for done in found), count_by_source(work.rejects))
    reused = sum(done.dialogues for done in found)
    kept = {done.name for done in found}
    progress = Progress(build.out, work.dialogues, reused, rejects)
    _build_missing([task for task in tasks if task.name not in kept], build.workers, progress)
    return finalise(build.out, tasks, facts, lambda rejects: _judge(build, rejects, work.rows))


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


def _facts(build: Build, work: Worklist, tasks: Sequence[ShardTask]) -> Facts:
    """`spec_sha256` stands for all that a manifest depends on but the pictures: while it is the same, so is the set."""
    rejects = build.out / WORK / EARLY_REJECTS
    shards = [task.spec_sha256 for task in tasks]
    spec_sha256 = _sha256([build.config.name, build.tokenizer.name, work.rows, file_sha256(rejects), shards])
    return Facts(build.config.name, build.settings, build.tokenizer, work.rows, rejects, spec_sha256)


def _build_missing(tasks: Sequence[ShardTask], workers: int | None, progress: Progress) -> None:
    if workers == 0:
        build_here(tasks, progress)
    elif tasks:
        from preprocess.builder.on_ray import build_on_ray  # here: a build in this process does without Ray

        build_on_ray(tasks, workers, progress)


def build_here(tasks: Sequence[ShardTask], progress: Progress) -> None:
    progress.tick()
    for task in tasks:
        finished = build_shard(task)
        progress.add(finished.dialogues, finished.rejects)
        progress.tick()
    progress.tick("finalising", last=True)


# -- What is said ----------------------------------------------------------------------------------------------------


def _judge(build: Build, rejects: RejectCounts, rows: Mapping[str, int]) -> None:
    """Tells the rejects that rejects.jsonl lists. Raises: TooManyRejectsError."""
    for line in summary_lines(rejects):
        print(line, flush=True)
    _refuse_too_many(build, rejects, rows, f"{build.out / REJECTS} says why")


def _refuse_too_many(build: Build, rejects: RejectCounts, rows: Mapping[str, int], where: str) -> None:
    if lost := sources_over_limit(rejects, rows, build.max_reject_ratio):
        raise TooManyRejectsError(
            f"more rows were rejected than --max-reject-ratio {build.max_reject_ratio} allows: {lost}; {where}; "
            "mend the data, or raise the ratio, and run again"
        )


def _summary(manifest: Manifest) -> str:
    counts = manifest.counts
    return (
        f"{counts['samples']} samples in {len(manifest.shards)} shards, {counts['rejects']} of {counts['rows']} rows "
        f"rejected, {counts['pictures']} pictures, {counts['text_tokens']} text tokens; set {manifest.sha256[:12]}"
    )


def _mixture(manifest: Manifest) -> str:
    makers = "; ".join(f"{shards} with {packages}" for packages, shards in manifest.made_with.items())
    return f"note: not all shards were made alike: {makers}; for pictures of one make, delete the shards and run again"


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
