"""`BuildRequest`: the checked arguments of preprocess/build_shards.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.config import EmmaConfig
from model.errors import UserError
from model.presets import preset
from preprocess.annotations.mix import Mix, load_mix
from preprocess.builder.sample_encoder import SampleSettings
from preprocess.images.store import ImageStore
from preprocess.prompts import Tokenizer, load_tokenizer
from preprocess.remote_path import AnyPath, find_file
from preprocess.shards.folder import ShardFolder


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """One build: its input, its output folder and its settings.

    Attributes:
        root: folder or URL of annotations and images.
        folder: folder of the shard set to build.
        workers: number of tasks at a time; None: one per CPU; 0: build in this process, without Ray.
        max_reject_ratio: share of a source's rows that may be rejected.
        compare_images: rebuild shards with an image whose size has changed.
    """

    mix: Mix
    config: EmmaConfig
    tokenizer: Tokenizer
    root: AnyPath
    folder: ShardFolder
    samples_per_shard: int
    workers: int | None
    max_reject_ratio: float
    compare_images: bool

    @property
    def settings(self) -> SampleSettings:
        return SampleSettings(
            template=self.config.template,
            tokenizer_sha256=self.tokenizer.sha256,
            image_px=self.config.vision.image_px,
            encoding=self.mix.images.encoding,
            max_text_tokens=self.config.max_text_tokens,
        )


def check_arguments(parsed: argparse.Namespace) -> BuildRequest:
    """Check the arguments and the input folders, without reading any row. Raises: UserError."""
    try:
        config = preset(parsed.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_range("--max-reject-ratio", parsed.max_reject_ratio, 0, 1)
    _check_range("--samples-per-shard", parsed.samples_per_shard, 1, 1_000_000)
    if parsed.workers is not None:
        _check_range("--workers", parsed.workers, 0, 1_000_000)
    if parsed.check and parsed.compare_images:
        raise UserError("--check does not compare images: leave out --check or --compare-images")
    _refuse_relative_paths_in_copy(parsed)
    mix = load_mix(parsed.mix)
    root = parsed.root.absolute()
    _check_root(mix, root)
    tokenizer = _find_tokenizer(parsed, mix, config)
    return BuildRequest(
        mix=mix,
        config=config,
        tokenizer=tokenizer,
        root=root,
        folder=ShardFolder(parsed.out.absolute()),
        samples_per_shard=parsed.samples_per_shard,
        workers=parsed.workers,
        max_reject_ratio=parsed.max_reject_ratio,
        compare_images=parsed.compare_images,
    )


def _check_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{option} is {value}, expected a number from {low} to {high}")


def _runs_in_copy() -> bool:
    """Return whether this is a Ray job with --working-dir.

    Ray runs such a job in a copy of the working directory, and deletes this copy when the job ends. The copy lacks the
    files that .rayignore and .gitignore exclude.
    """
    return "/runtime_resources/working_dir_files/" in str(Path.cwd())


def _refuse_relative_paths_in_copy(parsed: argparse.Namespace) -> None:
    """Raise UserError for relative paths that a Ray job with --working-dir cannot use."""
    if not _runs_in_copy():
        return
    for option, path in (("--root", parsed.root), ("--out", parsed.out)):
        if not path.is_absolute():
            raise UserError(
                f"{option} {path} is relative, but this job runs in a temporary copy. Give an absolute path"
            )
    if not parsed.mix.is_absolute() and not parsed.mix.exists():
        raise UserError(
            f"{parsed.mix} is relative, but this job runs in a temporary copy, which lacks this mix because .rayignore "
            "or .gitignore excludes it, or because it does not exist. Give an absolute path"
        )


def _check_root(mix: Mix, root: AnyPath) -> None:
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder; it must hold the annotations and images that the mix names")
    if missing := list(_missing(mix, root)):
        raise UserError("; ".join(missing) + "; put the missing files there, or correct the mix or --root")


def _missing(mix: Mix, root: AnyPath) -> Iterator[str]:
    store = ImageStore(root, mix.archives)
    for source in mix.sources:
        annotations = find_file(root, source.annotations)
        if not annotations.is_file():
            state = "is a folder, expected a file" if annotations.is_dir() else "is missing"
            yield f"source {source.name!r}: annotation file {annotations} {state}"
        if not store.has_folder(source.images or "."):
            yield f"source {source.name!r}: image folder {root / source.images} is missing"


def _find_tokenizer(parsed: argparse.Namespace, mix: Mix, config: EmmaConfig) -> Tokenizer:
    name = parsed.tokenizer or mix.tokenizer or config.tokenizer
    if name is None:
        raise UserError(f"preset {config.name} has no default tokenizer: give --tokenizer, or `tokenizer` in the mix")
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        if not _runs_in_copy() or Path(name).is_absolute():
            raise
        raise UserError(
            f"{error}. If {name} is a folder: it is relative, but this job runs in a temporary copy. Give an absolute "
            "path"
        ) from None
    rows = config.llm.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer {name} has ids up to {tokenizer.vocab_size - 1}, but preset {config.name} has "
            f"{rows} token embeddings. Choose a smaller tokenizer or another preset"
        )
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} ids, but shards store at most {1 << 16} (16 bits per token)"
        )
    return tokenizer
