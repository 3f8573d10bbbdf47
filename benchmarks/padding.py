"""Padding benchmark: the share of computation spent on padding, and on waiting for the slowest of eight ranks.

    python -m benchmarks.padding --json padding.json
    python -m benchmarks.padding --shards /data/shards     # text lengths of an existing shard set

Compares three orders of samples: the plan of `pipeline.data.plan` with several windows, random order, and the scheme of
LLaVA and Prismatic, whose global batches are of one modality and sorted by length. Under ZeRO-3 the ranks run in
lockstep, so each micro-batch takes as long on every rank as the longest row of all ranks. docs/performance.md has the
table.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import run_cli
from model.presets import preset
from pipeline.data.plan import FILLER, Ids, Plan
from preprocess.shards.manifest import load_index

RANKS, MICRO_BATCH, GLOBAL_BATCH = 8, 16, 128
PATCHES = preset("emma_v2").vision.num_patches
MAX_TEXT = preset("emma_v2").max_text_tokens
WINDOWS = (1, 8, 25, 50, 100, 200, 400)

# By source: number of rows, median number of text tokens, and standard deviation of that number's logarithm. The
# numbers of rows are the paper's. The lengths are guesses for each kind of dialogue: several turns about an image, long
# chats, descriptions, questions.
SOURCES = {
    "llava": (624_610, 150, 0.8),
    "llava without image": (40_688, 700, 0.9),
    "lvis": (222_711, 300, 0.5),
    "lrv": (342_799, 45, 0.4),
}

Lengths = npt.NDArray[np.int32]
Batches = npt.NDArray[np.int64]  # [steps, ranks, micro-steps, micro-batch]: index rows


def llava_like(share: float = 1.0) -> tuple[Lengths, npt.NDArray[np.bool_]]:
    """Draw the text lengths of a share of the mix's rows, and whether each row has an image."""
    rng = np.random.Generator(np.random.Philox(key=11))
    tokens, has_image = [], []
    for name, (rows, median, spread) in SOURCES.items():
        count = round(rows * share)
        tokens.append(np.exp(rng.normal(np.log(median), spread, count)).clip(8, MAX_TEXT).astype(np.int32))
        has_image.append(np.full(count, "without" not in name))
    return np.concatenate(tokens), np.concatenate(has_image)


def of_shards(folder: Path) -> tuple[Lengths, npt.NDArray[np.bool_]]:
    index = load_index(folder)
    return index.column("num_text_tokens").to_numpy(), index.column("has_image").to_numpy(zero_copy_only=False)


# -- The schemes -----------------------------------------------------------------------------------------------------


def planned(tokens: Lengths, has_image: npt.NDArray[np.bool_], window: int) -> Batches:
    plan = Plan(
        text_tokens=tokens,
        has_image=has_image,
        manifest_sha256="0" * 64,
        seed=0,
        global_batch=GLOBAL_BATCH,
        window=window,
    )
    return _contiguous(plan.epoch(0))


def at_random(tokens: Lengths, has_image: npt.NDArray[np.bool_]) -> Batches:
    return _contiguous(_filled(_shuffled(np.arange(len(tokens)))))


def split_modality(tokens: Lengths, has_image: npt.NDArray[np.bool_]) -> Batches:
    """Build global batches of one modality. Their rows are sorted by length and assigned to the ranks in turn."""
    parts = [_filled(_shuffled(np.flatnonzero(kind))) for kind in (has_image, ~has_image)]
    batches = np.concatenate([part for part in parts if len(part)])
    length = np.where(batches == FILLER, 0, tokens[batches])
    batches = np.take_along_axis(batches, np.argsort(-length, axis=1, kind="stable"), axis=1)
    return batches.reshape(len(batches), -1, MICRO_BATCH, RANKS).transpose(0, 3, 1, 2)


def _contiguous(batches: Ids) -> Batches:
    """Give each rank adjacent rows, as `plan.rank_slices` does."""
    return batches.reshape(len(batches), -1, RANKS, MICRO_BATCH).transpose(0, 2, 1, 3)


def _shuffled(rows: Ids) -> Ids:
    return np.random.Generator(np.random.Philox(key=5)).permutation(rows)


def _filled(rows: Ids) -> Ids:
    return np.concatenate([rows, np.full(-len(rows) % GLOBAL_BATCH, FILLER)]).reshape(-1, GLOBAL_BATCH)


# -- The measure -----------------------------------------------------------------------------------------------------


def waste(batches: Batches, tokens: Lengths, has_image: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return two shares of padding in the computed positions: within each rank, and with the ranks in lockstep.

    Within a rank, rows are padded to the longest row of its micro-batch. In lockstep, every rank takes as long as if it
    padded to the longest row of all ranks. In a micro-batch that mixes modalities, every row is computed with an image.
    """
    real = np.where(batches == FILLER, 0, tokens[batches] + PATCHES * has_image[batches])
    needed = real.sum(dtype=np.int64)
    longest = _longest(batches, tokens, has_image, axis=(3,))
    slowest = _longest(batches, tokens, has_image, axis=(1, 3))
    own, lockstep = MICRO_BATCH * longest.sum(dtype=np.int64), MICRO_BATCH * RANKS * slowest.sum(dtype=np.int64)
    return 1 - needed / own, 1 - needed / lockstep


def _longest(
    batches: Batches, tokens: Lengths, has_image: npt.NDArray[np.bool_], axis: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    is_real = batches != FILLER
    text = np.where(is_real, tokens[batches], 0).max(axis=axis)
    return text.astype(np.int64) + PATCHES * (is_real & has_image[batches]).any(axis=axis)


def measure(tokens: Lengths, has_image: npt.NDArray[np.bool_], windows: tuple[int, ...] = WINDOWS) -> dict[str, Any]:
    schemes: dict[str, Callable[[], Batches]] = {
        "random": lambda: at_random(tokens, has_image),
        "split-modality, sorted inside the global batch": lambda: split_modality(tokens, has_image),
    }
    for window in windows:
        schemes[f"plan, window {window}"] = lambda window=window: planned(tokens, has_image, window)  # type: ignore[misc]
    results: dict[str, Any] = {}
    for name, scheme in schemes.items():
        started = time.process_time()
        batches = scheme()
        took = time.process_time() - started
        within, lockstep = waste(batches, tokens, has_image)
        results[name] = {"within_ranks": within, "with_the_wait": lockstep, "planning_s": took}
    return results


def table(results: Mapping[str, Any]) -> str:
    lines = ["| | padding within each rank | and the wait for the slowest of 8 | planned in |", "|---|---|---|---|"]
    for name, found in results.items():
        lines.append(
            f"| {name} | {found['within_ranks']:.2%} | {found['with_the_wait']:.2%} | {found['planning_s']:.2f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="use the text lengths of this set instead of synthetic ones")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS, help="windows of the plan to compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    tokens, has_image = of_shards(args.shards) if args.shards else llava_like()
    results = measure(tokens, has_image, tuple(args.windows))
    print(f"{len(tokens)} samples, {tokens.mean():.0f} text tokens on average, {has_image.mean():.1%} with an image")
    print(table(results))
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_cli(main)
