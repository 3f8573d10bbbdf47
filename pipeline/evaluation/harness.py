"""Running benchmarks with lmms-eval: offline settings, task configurations, answer journals, and scores."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import torch.distributed as dist
from tqdm import tqdm

from model.errors import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.benchmarks import IMAGES, Benchmark
from pipeline.inference.journal import Journal

if TYPE_CHECKING:
    from pipeline.evaluation.lmms_model import EmmaModel

MODEL_NAME = "emma"  # tasks may have settings for models by name


def require_lmms_eval() -> None:
    """Check that lmms-eval is installed, and set the process to offline use. Call this before importing lmms_eval.

    Raises: UserError if the package is not installed.
    """
    if find_spec("lmms_eval") is None:
        raise UserError("--tasks: the package lmms-eval is not installed. Install it: pip install -e '.[eval]'")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # it read the environment variable when it was imported
    _hide_progress_bars()


def _hide_progress_bars() -> None:
    """Switch off every tqdm bar of this process, because lmms-eval and datasets show several for each task."""
    init = tqdm.__init__
    tqdm.__init__ = lambda self, *args, **options: init(self, *args, **{**options, "disable": True})


def task_config(benchmark: Benchmark) -> dict[str, Any]:
    """Return the configuration of a benchmark's task, without its data."""
    import lmms_eval
    from lmms_eval.utils import load_yaml_config

    stock = Path(lmms_eval.__file__).parent / "tasks"
    own = benchmark.own_task
    config = load_yaml_config(str(own or stock / benchmark.stock), yaml_dir=str(stock) if own else None)
    return {**config, "task": benchmark.name, "dataset_path": "parquet", "dataset_name": None}


def task_version(config: dict[str, Any], files: dict[str, list[Path]]) -> str:
    """Return a hash of lmms-eval's version, the configuration of a task, and the names and sizes of its files."""
    sizes = {split: [(path.name, path.stat().st_size) for path in paths] for split, paths in files.items()}
    described = json.dumps(
        [importlib.metadata.version("lmms_eval"), config, sizes],
        sort_keys=True,
        default=lambda function: f"{function.__module__}.{function.__qualname__}",
    )
    return hashlib.sha256(described.encode()).hexdigest()


def _add_files(config: dict[str, Any], files: dict[str, list[Path]]) -> None:
    """Make a task read its data set from files. Files of `IMAGES` are passed to the function that opens images."""
    paths = {split: [str(path) for path in found] for split, found in files.items()}
    if images := paths.pop(IMAGES, None):
        config["lmms_eval_specific_kwargs"]["default"]["image_files"] = images
    config["dataset_kwargs"] = {"data_files": paths}


def run_benchmark(
    model: EmmaModel, benchmark: Benchmark, data: Path, out: Path, *, settings: dict[str, Any], ranks: Ranks
) -> dict[str, Any] | None:
    """Evaluate a benchmark. Must be called on every rank; returns the result on the main rank, and None on others.

    The answers are kept in `out`/journal. A later call with the same settings and the same task continues.

    Args:
        settings: Key of the answers: the model's hashes, and how it generates.
    """
    config, files = task_config(benchmark), benchmark.files(data)
    version = task_version(config, files)
    _add_files(config, files)
    key = {**settings, "task": benchmark.name, "task_version": version}
    with _journal(model, out / "journal", key, ranks):
        output = _evaluate(model, config, out, ranks)
    if output is None:
        return None
    metrics = {name: value for name, value in output["results"][benchmark.name].items() if _is_metric(name, value)}
    missing = [name for name in benchmark.metrics if name not in metrics]
    assert not missing, f"{benchmark.name}: lmms-eval returned {sorted(metrics)}, expected {missing}"
    return {
        "score": benchmark.scale * sum(metrics[name] for name in benchmark.metrics),
        "questions": output["n-samples"][benchmark.name]["effective"],
        "metrics": metrics,
        "task_version": version,
    }


def _is_metric(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and "," in name and "_stderr" not in name


@contextlib.contextmanager
def _journal(model: EmmaModel, folder: Path, key: dict[str, Any], ranks: Ranks) -> Iterator[None]:
    """Give the model this rank's journal for a task, and all answers that earlier calls with the same key computed.

    The number of ranks may differ from earlier calls. Therefore, the main rank reads all journals, and each rank then
    writes its own.
    """
    known: list[dict[str, Any]] = [{}]
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{key['task']}.*.jsonl"):
            with Journal(path, key) as journal:
                known[0] |= journal.answers
    if ranks.world_size > 1:
        dist.broadcast_object_list(known)
    model.known = known[0]
    with Journal(folder / f"{key['task']}.{ranks.rank}.jsonl", key) as model.journal:
        yield
    model.journal, model.known = None, {}


def _evaluate(model: EmmaModel, config: dict[str, Any], out: Path, ranks: Ranks) -> dict[str, Any] | None:
    """Run lmms-eval on one task. The main rank loads the data first, so that the other ranks find it in the cache."""
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    task = ConfigurableTask(config=config, model_name=MODEL_NAME) if ranks.is_main else None
    if ranks.world_size > 1:
        dist.barrier()
    task = task or ConfigurableTask(config=config, model_name=MODEL_NAME)
    _prepare_images(task)
    options = Namespace(output_path=str(out), process_with_media=False, reasoning_tags=None)
    return simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False, model_name=MODEL_NAME),
        bootstrap_iters=0,
        log_samples=False,
        cli_args=options,
        distributed_executor_backend="torchrun",
    )


def _prepare_images(task: Any) -> None:
    """Decode columns of image files as images, and leave these columns out of the documents without images.

    lmms-eval does neither for files without the hub's column types, and not the latter for lists of images.
    """
    import datasets

    for split, documents in task.dataset.items():
        for name, kind in documents.features.items():
            is_file = isinstance(kind, dict) and kind.keys() == {"bytes", "path"}
            if is_file:
                task.dataset[split] = task.dataset[split].cast_column(name, datasets.Image())
            is_image = isinstance(getattr(kind, "feature", kind), datasets.Image)
            if (is_file or is_image) and name in task.dataset_no_image[split].column_names:
                task.dataset_no_image[split] = task.dataset_no_image[split].remove_columns(name)
