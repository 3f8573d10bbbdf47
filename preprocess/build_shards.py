#!/usr/bin/env python
"""Build a shard set: WebDataset tars with a manifest and an index, from annotation files and images.

One Ray task builds one shard from a fixed range of dialogues. Every input row becomes exactly one sample or one line of
rejects.jsonl. If the same command is run again, it builds only shards that are missing or outdated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import ExitCode, run_cli
from preprocess.builder.build import build, check
from preprocess.builder.output_folder import user_oserrors
from preprocess.builder.request import check_arguments
from preprocess.builder.sigterm import Terminated, sigterm_raises
from preprocess.remote_path import parse_path

PAPER_MIX = Path("preprocess/mixes/emma_1m2.toml")
SAMPLES_PER_SHARD = 4096
STOPPED = "stopped; finished shards are kept, and the same command continues with the missing ones"

EXAMPLES = """examples:
  preprocess/build_shards.py preprocess/mixes/emma_1m2.toml --model emma_v2 --root /data/raw --out /data/shards
  preprocess/build_shards.py my.toml --model tiny_v2 --root raw --out shards --tokenizer my_tokenizer --check
  ray job submit --working-dir . -- python preprocess/build_shards.py MIX.toml --model emma_v2 --root /… --out /…

The build runs on the Ray cluster that RAY_ADDRESS names; inside a Ray job, Ray sets it. Without RAY_ADDRESS, the
build starts Ray on this machine. --root and --out must name the same folders on every node.

If a missing image has been added or a rejected image has been repaired, running the same command again rebuilds its
shard. If an accepted image has been replaced, its shard is rebuilt only with --compare-images, which compares the file
size of every image.

exit codes: 0 done, 2 user error (explained in one line), 3 too many rejects, 4 transient failure, 130 stopped by
Ctrl-C, 143 stopped by SIGTERM. Finished shards are always kept, and the same command continues with the missing ones.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    try:
        with sigterm_raises(), user_oserrors(parsed.out, then="run the same command again: finished shards are kept"):
            request = check_arguments(parsed)
            if parsed.check:
                check(request)
            else:
                build(request)
    except KeyboardInterrupt as stop:
        print(STOPPED, file=sys.stderr, flush=True)
        return ExitCode.TERMINATED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
    return ExitCode.OK


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("mix", type=Path, nargs="?", default=PAPER_MIX, help=f"TOML file that lists the sources {default}")
    add(
        "--model",
        default="emma_v2",
        help=f"model preset, which sets prompt template, image size and text limit {default}",
    )
    add(
        "--root",
        type=parse_path,
        default="data/raw",
        help=f"folder or URL (s3://…) of the annotations and images {default}",
    )
    add("--out", type=Path, default=Path("data/shards"), help=f"folder of the shard set to build {default}")
    add(
        "--tokenizer", help="hub id, or folder with a tokenizer.json; overrides the tokenizer of the mix and the preset"
    )
    add(
        "--max-reject-ratio",
        type=float,
        default=0.01,
        help=f"fail if a larger share of a source's rows is rejected {default}",
    )
    add("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help=f"dialogues per shard {default}")
    add(
        "--workers",
        type=int,
        help="number of tasks at a time (default: one per CPU); 0 builds in this process, without Ray",
    )
    add(
        "--compare-images",
        action="store_true",
        help="also rebuild shards with an image whose file size has changed; this looks up the size of every image",
    )
    add("--compare-pictures", action="store_true", dest="compare_images", help=argparse.SUPPRESS)
    add(
        "--check",
        "--dry-run",
        action="store_true",
        help="read every row and a few images of each source, report what would be built, write nothing",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_cli(main)
