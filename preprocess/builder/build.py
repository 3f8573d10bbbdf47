"""`build` and `check`: the steps of `preprocess/build_shards.py`, from the worklist to the manifest."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from model.hashing import file_sha256
from preprocess.annotations.worklist import Worklist, check_feasible, make_worklist, notes
from preprocess.atomic import publish, published
from preprocess.builder.finalise import ManifestInputs, publish_index, publish_manifest, publish_rejects
from preprocess.builder.output_folder import (
    build_lock,
    earlier_version_note,
    refuse_foreign_files,
    remove_leftovers,
    remove_manifest,
    remove_orphans,
    remove_work_files,
    reusable_manifest,
    reusable_shard,
)
from preprocess.builder.plan import plan_tasks, row_logger, set_spec_sha256, write_worklist
from preprocess.builder.request import BuildRequest
from preprocess.builder.survey import Survey
from preprocess.builder.task import ShardResult, ShardTask, build_shard
from preprocess.images.store import ImageStore
from preprocess.progress import Progress
from preprocess.rejects import (
    RejectCounts,
    TooManyRejectsError,
    count_by_source,
    count_rejects,
    sources_over_limit,
    summary_lines,
)
from preprocess.shards.manifest import Manifest


def check(request: BuildRequest) -> None:
    """Read every row and a few images of each source, and print a report. Write no files.

    Raises: UserError if the build would fail.
    """
    refuse_foreign_files(request.folder)
    survey, store = Survey(), ImageStore(request.root, request.mix.archives)
    work = make_worklist(
        request.mix, request.root, samples_per_shard=request.samples_per_shard, write=survey.write, on_rows=row_logger()
    )
    for line in [*survey.report(request.mix, work, store), *notes(request.mix, work), *summary_lines(work.rejects)]:
        print(line, flush=True)
    check_feasible(work, store, request.max_reject_ratio)
    _refuse_too_many(request, work.rejects, work.rows, "a build lists them in rejects.jsonl before it reads any image")
    tasks = plan_tasks(request, work)
    missing = [task for task in tasks if not reusable_shard(task)]
    for line in earlier_version_note(request.folder, missing):
        print(line, flush=True)
    print(f"{len(tasks)} shards of {work.dialogues} dialogues, {len(missing)} of them to be built in {request.folder}")


def build(request: BuildRequest) -> Manifest:
    """Build the shards that are missing or outdated, then write the manifest. A set that is up to date is not changed.

    Raises: UserError; TooManyRejectsError, after rejects.jsonl is written and the manifest is removed.
    """
    folder = request.folder
    refuse_foreign_files(folder)
    with build_lock(folder):
        remove_leftovers(folder)
        work = write_worklist(request)
        for note in notes(request.mix, work):
            print(note, flush=True)
        check_feasible(work, ImageStore(request.root, request.mix.archives), request.max_reject_ratio)
        try:
            manifest, state = _reuse_or_build(request, work)
        except TooManyRejectsError:
            remove_manifest(folder)
            raise
        remove_work_files(folder)
    if len(manifest.made_with) > 1:
        print(_versions_note(manifest), flush=True)
    print(f"{folder} {state}: {_summary(manifest)}", flush=True)
    return manifest


def _reuse_or_build(request: BuildRequest, work: Worklist) -> tuple[Manifest, str]:
    """Return the manifest, and "is built" or "is up to date" for the last line of output."""
    _refuse_early(request, work)
    tasks = plan_tasks(request, work)
    found = [reusable_shard(task, compare_images=request.compare_images) for task in tasks]
    reused = [result for result in found if result]
    if len(reused) == len(tasks) and (manifest := reusable_manifest(request, work, tasks)):
        _report_rejects(request, count_rejects(request.folder.rejects), work.rows)
        return manifest, "is up to date"
    missing = [task for task, result in zip(tasks, found, strict=True) if result is None]
    for note in earlier_version_note(request.folder, missing):
        print(note, flush=True)
    return _build_set(request, work, tasks, reused), "is built"


def _refuse_early(request: BuildRequest, work: Worklist) -> None:
    """Raise TooManyRejectsError if too many rows are rejected already, before any image is read."""
    folder = request.folder
    if sources_over_limit(work.rejects, work.rows, request.max_reject_ratio):
        remove_manifest(folder)  # because it holds the hash of the old rejects.jsonl
        with folder.early_rejects.open("rb") as lines, published(folder.rejects) as file:
            shutil.copyfileobj(lines, file)
        _report_rejects(request, work.rejects, work.rows)


def _build_set(
    request: BuildRequest, work: Worklist, tasks: Sequence[ShardTask], reused: Sequence[ShardResult]
) -> Manifest:
    folder = request.folder
    remove_manifest(folder)
    remove_orphans(folder, {task.name for task in tasks})
    publish(folder.tokenizer, request.tokenizer.data)
    rejects = sum((Counter(result.rejects) for result in reused), count_by_source(work.rejects))
    reused_dialogues = sum(result.dialogues for result in reused)
    progress = Progress(folder, work.dialogues, reused=reused_dialogues, rejects=rejects)
    finished = {result.name for result in reused}
    _build_shards([task for task in tasks if task.name not in finished], request.workers, progress)
    contents = publish_index(folder, tasks)
    published_rejects = publish_rejects(folder, tasks, list(work.rows))
    _report_rejects(request, published_rejects.counts, work.rows)
    inputs = ManifestInputs(
        model=request.config.name,
        settings=request.settings,
        tokenizer=request.tokenizer,
        rows=work.rows,
        spec_sha256=set_spec_sha256(request, work, tasks, file_sha256(folder.early_rejects)),
    )
    return publish_manifest(folder, inputs, contents, published_rejects)


def _build_shards(tasks: Sequence[ShardTask], workers: int | None, progress: Progress) -> None:
    if workers == 0:
        _build_in_this_process(tasks, progress)
    elif tasks:
        # Imported here, so that builds without Ray do not import it.
        from preprocess.builder.on_ray import build_on_ray

        build_on_ray(tasks, workers, progress)


def _build_in_this_process(tasks: Sequence[ShardTask], progress: Progress) -> None:
    progress.tick()
    for task in tasks:
        result = build_shard(task)
        progress.add(result.dialogues, result.rejects)
        progress.tick()
    progress.tick("finalising", last=True)


def _report_rejects(request: BuildRequest, rejects: RejectCounts, rows: Mapping[str, int]) -> None:
    """Print the number of rejects for each source and reason. Raises: TooManyRejectsError if a source has too many."""
    for line in summary_lines(rejects):
        print(line, flush=True)
    _refuse_too_many(request, rejects, rows, f"{request.folder.rejects} lists them with their reasons")


def _refuse_too_many(request: BuildRequest, rejects: RejectCounts, rows: Mapping[str, int], where: str) -> None:
    if lost := sources_over_limit(rejects, rows, request.max_reject_ratio):
        raise TooManyRejectsError(
            f"more rows were rejected than --max-reject-ratio {request.max_reject_ratio} allows: {lost}; {where}; "
            "fix the data or raise the ratio, then run the same command again"
        )


def _summary(manifest: Manifest) -> str:
    counts = manifest.counts
    return (
        f"{counts['samples']} samples in {len(manifest.shards)} shards, {counts['rejects']} of {counts['rows']} rows "
        f"rejected, {counts['pictures']} images, {counts['text_tokens']} text tokens; set {manifest.sha256[:12]}"
    )


def _versions_note(manifest: Manifest) -> str:
    versions = "; ".join(f"{shards} with {packages}" for packages, shards in manifest.made_with.items())
    return (
        f"note: shards were built with different package versions: {versions}; images may differ slightly. "
        "To build all with the same versions, delete the shards and run the same command again"
    )
