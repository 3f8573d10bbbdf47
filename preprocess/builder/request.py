"""What a build was asked for. Everything that can be wrong before work starts is looked at here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.config import EmmaConfig
from model.errors import UserError
from model.presets import preset
from preprocess.annotations.mix import Mix, load_mix
from preprocess.builder.task import Settings
from preprocess.images.store import ImageStore
from preprocess.prompts import Tokenizer, load_tokenizer
from preprocess.remote_path import AnyPath


@dataclass(frozen=True)
class Build:
    """One checked request."""

    mix: Mix
    config: EmmaConfig
    tokenizer: Tokenizer
    root: AnyPath
    out: Path
    samples_per_shard: int
    workers: int | None
    max_reject_ratio: float
    compare_pictures: bool

    @property
    def settings(self) -> Settings:
        return Settings(
            self.config.template,
            self.tokenizer.sha256,
            self.config.vision.image_px,
            self.mix.encoding,
            self.config.max_text_tokens,
        )


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
    if parsed.check and parsed.compare_pictures:
        raise UserError("--check does not compare pictures: leave out --check, or --compare-pictures")
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
        parsed.compare_pictures,
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


def _check_root(mix: Mix, root: AnyPath) -> None:
    if not root.is_dir():
        raise UserError(f"--root {root} is no folder; it must hold the annotations and pictures that the mix names")
    if missing := list(_missing(mix, root)):
        raise UserError("; ".join(missing) + "; put what is missing there, or mend the mix or --root")


def _missing(mix: Mix, root: AnyPath) -> Iterator[str]:
    store = ImageStore(root, mix.archives)
    for source in mix.sources:
        if not (root / source.annotations).is_file():
            yield f"source {source.name!r}: annotation file {root / source.annotations} is missing"
        if not store.has_folder(source.images or "."):
            yield f"source {source.name!r}: picture folder {root / source.images} is missing"


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
