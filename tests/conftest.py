"""Shared fixtures: raw data, a shard set of the real builder, a recipe and a SLURM cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import SlurmCluster, missing_programs
from tests.support.tiny_data import TINY_RECIPE, build_shards, write_raw_data

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, because several tests run at the same time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that wait for SLURM first, so that other tests use the processors meanwhile."""
    items.sort(key=lambda item: not item.path.name.startswith("test_slurm"))


@pytest.fixture(scope="session")
def raw_mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_data(tmp_path_factory.mktemp("raw") / "root", num_images=26, num_text_only=9)


@pytest.fixture(scope="session")
def shards(raw_mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build 26 samples with image and 9 without. At global batch 8, two of the six steps per epoch are text-only."""
    return build_shards(raw_mix, tmp_path_factory.mktemp("shards") / "v2")


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        reason = f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
