"""Functions that our task files name: images of GQA, filters, prompts and scores that need no judge."""

from __future__ import annotations

from functools import cache
from typing import Any

import datasets
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from PIL import Image

Document = dict[str, Any]


def gqa_image(document: Document, settings: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a GQA question. `settings["image_files"]` lists the parquet files of the images."""
    images, rows = _gqa_images(tuple(settings["image_files"]))
    return [images[rows[document["imageId"]]]["image"].convert("RGB")]


@cache
def _gqa_images(files: tuple[str, ...]) -> tuple[datasets.Dataset, dict[str, int]]:
    """Open the images of GQA, which stay on disk, and return them with the row of each image id."""
    images = datasets.load_dataset("parquet", data_files={"images": list(files)}, split="images")
    images = images.cast_column("image", datasets.Image())
    return images, {image_id: row for row, image_id in enumerate(images["id"])}


def seed_images_only(documents: datasets.Dataset) -> datasets.Dataset:
    """Keep the questions of SEED-Bench about images."""
    return documents.filter(lambda kind: kind == "image", input_columns=["data_type"])


def vsr_image(document: Document) -> list[Image.Image]:
    """Return the image of a VSR statement."""
    return [document["image"].convert("RGB")]


def vsr_target(document: Document) -> str:
    """Return the correct answer of a VSR statement, whose label is 0 or 1."""
    return "True" if document["label"] else "False"


def mmbench_score(results: list[Document]) -> float:
    """Return the share of correct answers in percent, without asking a judge. Takes the results of MMBench's tasks."""
    return 100 * MMBench_Evaluator().eval_result(results, eval_method="static")[0]
