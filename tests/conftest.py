"""Shared fixtures: raw data, a shard set built by the real builder, a recipe, a tiny model and a SLURM cluster."""

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support.slurm import SlurmCluster, missing_programs
from tests.support.tiny_data import TINY_RECIPE, build_shards, write_raw_data
from tests.support.tiny_model import save_tiny_model, write_images

# The files that wait for SLURM or Ray run first, because other files can use the processors in the meantime.
LONGEST_FILES = (
    "test_slurm_requeue.py",
    "test_slurm_train_emma.py",
    "test_slurm_evaluate_emma.py",
    "test_slurm_preprocess.py",
    "test_preprocess_accidents.py",
    "test_pipeline_benchmarks.py",
    "test_pipeline_train.py",
    "test_pipeline_published.py",
    "test_pipeline_export.py",
    "test_pipeline_fine_tuning.py",
    "test_preprocess_build_shards.py",
    "test_pipeline_checkpoint.py",
    "test_pipeline_step.py",
    "test_pipeline_metrics.py",
    "test_pipeline_watchdog.py",
    "test_pipeline_presets.py",
)

# A shell ignores SIGINT in background jobs, and programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported, because several tests run in parallel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest test files first, so that no processor is idle at the end."""
    first = {name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a skipped test if FAIL_ON_SKIP is 1, because CI installs everything that tests need except a GPU.

    Tests may still be skipped because of the machine: a container may not mount file systems, and an unpacked archive
    is not a git checkout. The reasons of these skips begin with "this machine".
    """
    report = yield
    must_run = os.environ.get("FAIL_ON_SKIP") == "1" and item.get_closest_marker("gpu") is None
    if report.skipped and must_run and "Skipped: this machine" not in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def raw_mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_data(tmp_path_factory.mktemp("raw") / "root", num_images=26, num_text_only=9)


@pytest.fixture(scope="session")
def shards(raw_mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a set of 26 image samples and 9 text-only samples. At global batch 8, two of six steps are text-only."""
    return build_shards(raw_mix, tmp_path_factory.mktemp("shards") / "v2")


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny_model") / "m")


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the images a.png, b.png and c.png."""
    return write_images(tmp_path_factory.mktemp("noise_images"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        reason = f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
