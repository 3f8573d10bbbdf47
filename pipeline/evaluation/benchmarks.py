"""The paper's benchmarks: their data sets on the hub, task files, metrics, and the paper's results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError, did_you_mean, first_line

PAPER_MODELS = ("EMMA-V1", "EMMA-V2", "Cobra")
TASKS = Path(__file__).parent / "tasks"
SPLIT, JUDGE = "split", "judge"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: where its data is, how it is scored, and what the paper reports.

    Attributes:
        column: Name of its column in the paper.
        stock: Task file of lmms-eval, below `lmms_eval/tasks`, or "" if it has none. If `TASKS` has a file with the
            benchmark's name, that file is used instead.
        hub_id: Data set on the Hugging Face hub.
        config: Configuration of that data set.
        images_config: Configuration that holds the images, if it is another one.
        split: Split that is evaluated.
        metrics: Metrics whose sum is the score, as lmms-eval names them.
        scale: Factor from the metrics to the score in the paper's unit.
        paper: Results of `PAPER_MODELS`; empty if the paper does not report this benchmark.
        differs: What differs from the paper's protocol: `SPLIT`, `JUDGE`.
    """

    name: str
    column: str
    stock: str
    hub_id: str
    config: str | None = None
    images_config: str | None = None
    split: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    paper: tuple[float, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def own_task(self) -> Path | None:
        """Our task file, or None if the stock task is used as it is."""
        path = TASKS / f"{self.name}.yaml"
        return path if path.exists() else None

    @property
    def patterns(self) -> dict[str, str]:
        """Patterns of the data set's files, on the hub and below `--data`/name.

        The evaluated split has its own name as key, and the images of `images_config` have `IMAGES`.
        """
        patterns = {self.split: f"{self.config or 'data'}/{self.split}-*.parquet"}
        return patterns | ({IMAGES: f"{self.images_config}/{self.split}-*.parquet"} if self.images_config else {})

    def files(self, data: Path) -> dict[str, list[Path]]:
        """List the parquet files of the data set, by the keys of `patterns`."""
        return {key: sorted((data / self.name).glob(pattern)) for key, pattern in self.patterns.items()}

    def is_complete(self, data: Path) -> bool:
        """Return whether all files exist. A name such as dev-00000-of-00003.parquet tells how many there are."""
        found = list(self.files(data).values())
        numbers = (re.search(r"-of-(\d+)", files[0].name) if files else None for files in found)
        counts = [int(number[1]) if number else 1 for number in numbers]
        return all(len(files) >= count for files, count in zip(found, counts, strict=True))


IMAGES = "images"
HUB = "lmms-lab-encoder"
EXACT_MATCH = ("exact_match,none",)
BY_LETTER = ("gpt_eval_score,none",)  # the stock name; no GPT is asked
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="vqav2",
            column="VQAv2",
            stock="vqav2/vqav2_val.yaml",
            hub_id=f"{HUB}/VQAv2",
            split="validation",
            metrics=EXACT_MATCH,
            paper=(76.3, 75.7, 74.9),
            differs=(SPLIT,),
        ),
        Benchmark(
            name="gqa",
            column="GQA",
            stock="gqa/gqa.yaml",
            hub_id=f"{HUB}/GQA",
            config="testdev_balanced_instructions",
            images_config="testdev_balanced_images",
            split="testdev",
            metrics=EXACT_MATCH,
            paper=(60.5, 59.4, 59.1),
        ),
        Benchmark(
            name="vizwiz",
            column="VizWiz",
            stock="vizwiz_vqa/vizwiz_vqa_val.yaml",
            hub_id=f"{HUB}/VizWiz-VQA",
            split="val",
            metrics=EXACT_MATCH,
            paper=(52.1, 54.1, 52.0),
            differs=(SPLIT,),
        ),
        Benchmark(
            name="textvqa",
            column="TextVQA",
            stock="textvqa/textvqa_val.yaml",
            hub_id=f"{HUB}/textvqa",
            split="validation",
            metrics=EXACT_MATCH,
            paper=(57.2, 56.2, 52.4),
        ),
        Benchmark(
            name="vsr",
            column="VSR",
            stock="",
            hub_id="cambridgeltl/vsr_zeroshot",
            split="test",
            metrics=EXACT_MATCH,
            paper=(51.5, 52.7, 51.7),
        ),
        Benchmark(
            name="pope",
            column="POPE",
            stock="pope/pope.yaml",
            hub_id=f"{HUB}/POPE",
            split="test",
            metrics=("pope_accuracy,none",),
            paper=(88.0, 87.3, 87.2),
        ),
        Benchmark(
            name="hallusionbench",
            column="HallusionBench",
            stock="hallusion_bench/hallusion_bench_image.yaml",
            hub_id=f"{HUB}/HallusionBench",
            split="image",
            metrics=("aAcc,none",),
            paper=(51.0, 47.5, 41.4),
            differs=(JUDGE,),
        ),
        Benchmark(
            name="mmbench",
            column="MMBench",
            stock="mmbench/mmbench_en_dev_static.yaml",
            hub_id=f"{HUB}/MMBench",
            config="en",
            split="dev",
            metrics=BY_LETTER,
            scale=1.0,
            paper=(53.2, 60.8, 51.5),
            differs=(JUDGE,),
        ),
        Benchmark(
            name="mmbench_cn",
            column="MMBench cn",
            stock="mmbench/mmbench_cn_dev.yaml",
            hub_id=f"{HUB}/MMBench",
            config="cn",
            split="dev",
            metrics=BY_LETTER,
            scale=1.0,
        ),
        Benchmark(
            name="ccbench",
            column="CCBench",
            stock="mmbench/mmbench_cc.yaml",
            hub_id=f"{HUB}/MMBench",
            config="cc",
            split="test",
            metrics=BY_LETTER,
            scale=1.0,
            paper=(16.7, 29.21, 11.6),
            differs=(JUDGE,),
        ),
        Benchmark(
            name="mme",
            column="MME",
            stock="mme/mme.yaml",
            hub_id=f"{HUB}/MME",
            split="test",
            metrics=("mme_perception_score,none", "mme_cognition_score,none"),
            scale=1.0,
            paper=(1572.8, 1454.9, 1294.3),
        ),
        Benchmark(
            name="seed",
            column="SEED",
            stock="seedbench/seedbench.yaml",
            hub_id=f"{HUB}/SEED-Bench",
            split="test",
            metrics=("seed_image,none",),
            paper=(62.9, 64.3, 61.5),
        ),
        Benchmark(
            name="scienceqa",
            column="ScienceQA",
            stock="scienceqa/scienceqa_img.yaml",
            hub_id=f"{HUB}/ScienceQA",
            config="ScienceQA-IMG",
            split="test",
            metrics=EXACT_MATCH,
            paper=(66.3, 65.0, 63.0),
        ),
        Benchmark(
            name="ai2d",
            column="AI2D",
            stock="ai2d/ai2d.yaml",
            hub_id=f"{HUB}/ai2d",
            split="test",
            metrics=("exact_match,flexible-extract",),
            paper=(50.5, 49.1, 48.6),
        ),
    )
}


def choose(names: Sequence[str]) -> list[Benchmark]:
    """Return the named benchmarks, or all for the name "all". Raises: UserError for an unknown name."""
    if "all" in names:
        return list(BENCHMARKS.values())
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(
                f"benchmark {name!r} is unknown{did_you_mean(name, BENCHMARKS)}. "
                f"Expected all or some of: {', '.join(BENCHMARKS)}"
            )
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def check_data(benchmarks: Sequence[Benchmark], data: Path) -> None:
    """Check that all files of the benchmarks exist and are parquet files.

    Raises: UserError that names all benchmarks without files, or the first damaged file.
    """
    missing = [benchmark.name for benchmark in benchmarks if not benchmark.is_complete(data)]
    if missing:
        raise UserError(
            f"--data {data}: found no parquet files, or not all of them, of {', '.join(missing)}. Download them on a "
            f"machine with internet access: python -m pipeline.prefetch --benchmarks {data} {' '.join(missing)}"
        )
    for benchmark in benchmarks:
        for path in (path for files in benchmark.files(data).values() for path in files):
            _check_file(path)


def _check_file(path: Path) -> None:
    try:
        pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a whole parquet file ({first_line(error)}). Delete it and run pipeline.prefetch again"
        ) from None
