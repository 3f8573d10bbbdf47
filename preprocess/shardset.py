"""Looks at a built shard set: `verify` reads everything again, `info` tells it at a glance, `preview` shows it.

Exit codes: 0 sound, 1 damaged, 2 no shard set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.errors import UserError
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
EXIT_DAMAGED, EXIT_USER_ERROR = 1, 2
HISTOGRAM_BINS, BAR_CHARACTERS = 12, 40


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.verb == "verify":
            return run_verify(parsed.folder)
        if parsed.verb == "info":
            print("\n".join(info(parsed.folder)))
        else:
            print(run_preview(parsed.folder, parsed.out, parsed.samples))
    except (UserError, OSError) as error:  # the latter is the disk's, and says which file
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.shardset",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, help_ in (
        ("verify", "read everything again and name whatever is not as it was built"),
        ("info", "rows, pictures, tokens, lengths, sources and rejects"),
        ("preview", "write one HTML page with pictures, turns, what is supervised, and the rejects"),
    ):
        command = verbs.add_parser(verb, help=help_)
        command.add_argument("folder", type=Path)
        if verb == "preview":
            command.add_argument("--out", type=Path, help="the page (default: FOLDER-preview.html, beside the folder)")
            command.add_argument("--samples", type=int, default=60, help="how many are shown (default %(default)s)")
    return parser


def run_verify(folder: Path) -> int:
    """Prints each problem as it is found."""
    problems, progress = 0, Progress(None, Manifest.load(folder).counts["samples"], stream=sys.stderr)

    def tick(samples: int) -> None:
        progress.add(samples, {})
        progress.tick()

    for problem in verify(folder, tick):
        problems += 1
        print(problem, flush=True)
    if problems:
        print(f"{folder} is damaged: {problems} problems; {REMEDY}")
        return EXIT_DAMAGED
    print(f"{folder} is sound: {Manifest.load(folder).counts['samples']} samples, every byte as it was written")
    return 0


def run_preview(folder: Path, out: Path | None, samples: int) -> str:
    """Raises: UserError."""
    if samples < 0:
        raise UserError(f"--samples is {samples}, expected 0 or more")
    whole = folder.resolve()  # the name of "." is only there
    path = out or whole.parent / f"{whole.name}-preview.html"
    if path.is_dir():
        raise UserError(f"--out {path} is a folder, expected the name of a page: give {path / 'preview.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; make it, or give another place")
    with user_oserrors(path):
        return write_preview(folder, path, samples)


def info(folder: Path) -> list[str]:
    """The set at a glance, line by line."""
    manifest = Manifest.load(folder)
    counts, size = manifest.counts, sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{folder}: set {manifest.sha256}",
        f"  for {manifest.model}: template {manifest.template}, {manifest.image['px']} px pictures as "
        f"{manifest.image['encoding']}, at most {manifest.max_text_tokens} text tokens",
        f"  tokenizer {manifest.tokenizer['name']}: {manifest.tokenizer['vocab_size']} ids, "
        f"end of text {manifest.tokenizer['eos_id']}, sha256 {manifest.tokenizer['sha256'][:12]}",
        f"  {counts['samples']} samples in {len(manifest.shards)} shards, {size / 1e9:.3f} GB: "
        f"{counts['with_image']} with a picture ({counts['pictures']} distinct), {counts['text_only']} text-only",
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
    sys.exit(main())
