"""`pipeline.train` with a limit of GPU memory, so that a large GPU runs out of memory where a smaller one would.

torchrun --nproc-per-node 8 -m benchmarks.limited_training 39 pipeline/recipes/emma_v2.toml data.shards=DIR run.dir=RUN
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from pipeline import train
from pipeline.dry_run import limit_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", type=float, help="GiB of each GPU that torch may allocate; 0: no limit")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="recipe and overrides of pipeline.train")
    args = parser.parse_args()
    if args.gib and torch.cuda.is_available():
        limit_memory(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), args.gib)
    sys.argv[1:] = args.command
    train.main()


if __name__ == "__main__":
    main()
