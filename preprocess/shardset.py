"""Inspect a shard set: `verify` checks every file, `info` prints a summary, `preview` writes a web page of samples.

Exit codes: 0 intact, 1 damaged, 2 user error, such as a folder that is not a shard set, 4 transient disk failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.errors import ExitCode, UserError, run_cli
from preprocess.builder.output_folder import user_oserrors
from preprocess.progress import Progress
from preprocess.rejects import REASONS
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.preview import write_preview
from preprocess.shards.verify import REMEDY, verify

EXAMPLES = """examples:
  python -m preprocess.shardset verify /data/shards
  python -m preprocess.shardset info /data/shards
  python -m preprocess.shardset preview /data/shards --out preview.html --samples 100
"""
HISTOGRAM_BINS, BAR_CHARACTERS = 12, 40


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    if parsed.verb == "verify":
        return run_verify(parsed.folder)
    if parsed.verb == "info":
        print("\n".join(info(parsed.folder)))
    else:
        print(run_preview(parsed.folder, parsed.out, parsed.samples))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.shardset",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, help_ in (
        ("verify", "read every file and list all damage"),
        ("info", "print counts of samples, images, tokens and rejects, by source, and a histogram of lengths"),
        ("preview", "write one HTML page with images, text, supervised spans and rejects"),
    ):
        command = verbs.add_parser(verb, help=help_)
        command.add_argument("folder", type=Path, help="folder of the shard set")
        if verb == "preview":
            command.add_argument(
                "--out", type=Path, help="HTML file to write (default: FOLDER-preview.html beside the folder)"
            )
            command.add_argument(
                "--samples", type=int, default=60, help="number of samples to show (default: %(default)s)"
            )
    return parser


def run_verify(folder: Path) -> int:
    """Verify a shard set, and print each problem when it is found. Return the exit code."""
    samples = Manifest.load(folder).counts["samples"]
    problems, progress = 0, Progress(None, samples, stream=sys.stderr)

    def tick(read: int) -> None:
        progress.add(read, {})
        progress.tick()

    for problem in verify(folder, tick):
        problems += 1
        print(problem, flush=True)
    if problems:
        print(f"{folder} is damaged: {problems} problems; {REMEDY}")
        return ExitCode.DAMAGED
    print(f"{folder} is intact: {samples} samples, every byte as it was written")
    return ExitCode.OK


def run_preview(folder: Path, out: Path | None, samples: int) -> str:
    """Write the preview page. Return a line with its path and its numbers of samples and rejects. Raises: UserError."""
    if samples < 0:
        raise UserError(f"--samples is {samples}, expected 0 or more")
    resolved = folder.resolve()  # because "." has no name
    page = out or resolved.parent / f"{resolved.name}-preview.html"
    if page.is_dir():
        raise UserError(f"--out {page} is a folder, expected a file name such as {page / 'preview.html'}")
    if not page.parent.is_dir():
        raise UserError(f"--out {page}: there is no folder {page.parent}; create it, or give another path")
    with user_oserrors(page):
        return write_preview(folder, page, samples)


def info(folder: Path) -> list[str]:
    """Return a summary of the set as lines of text."""
    manifest = Manifest.load(folder)
    counts, size = manifest.counts, sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{folder}: set {manifest.sha256}",
        f"  for {manifest.model}: template {manifest.template}, {manifest.image['px']} px images as "
        f"{manifest.image['encoding']}, at most {manifest.max_text_tokens} text tokens",
        f"  tokenizer {manifest.tokenizer['name']}: {manifest.tokenizer['vocab_size']} ids, "
        f"end of text {manifest.tokenizer['eos_id']}, sha256 {manifest.tokenizer['sha256'][:12]}",
        f"  {counts['samples']} samples in {len(manifest.shards)} shards, {size / 1e9:.3f} GB: "
        f"{counts['with_image']} with an image ({counts['pictures']} distinct), {counts['text_only']} text-only",
        f"  {counts['text_tokens']} text tokens, {counts['supervised_tokens']} of them supervised",
        "",
        f"  {'source':<20} {'rows':>10} {'samples':>10} {'rejects':>10}",
    ]
    for name, about in [*manifest.sources.items(), ("all", counts)]:
        lines.append(f"  {name:<20} {about['rows']:>10} {about['samples']:>10} {about['rejects']:>10}")
    lines += ["", "  text tokens per sample", *_histogram(load_index(folder).column("num_text_tokens").to_numpy())]
    if manifest.rejects_by_reason:
        lines += ["", "  rejected rows"]
    for reason, count in sorted(manifest.rejects_by_reason.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:>10}  {reason}: {REASONS.get(reason, '')}")
    return lines


def _histogram(lengths: np.ndarray) -> list[str]:
    if not len(lengths):
        return ["  none"]
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, HISTOGRAM_BINS + 1).astype(int))
    counts, edges = np.histogram(lengths, edges if len(edges) > 1 else [edges[0], edges[0] + 1])
    bars = [round(BAR_CHARACTERS * count / counts.max()) for count in counts]
    return [
        f"  {low:>6} – {high - 1:<6} {count:>9} {'█' * bar}"
        for low, high, count, bar in zip(edges, edges[1:], counts, bars, strict=False)
    ]


if __name__ == "__main__":
    run_cli(main)
