"""The wheel: its contents, and imports from an installed wheel without the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import REPOSITORY

PACKAGES = ("model", "preprocess", "pipeline", "ds_configs")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
# Modules that need a package of an optional extra
NEEDS = {
    "pipeline.chat.page": "gradio",
    "pipeline.evaluation.lmms_model": "lmms_eval",
    "pipeline.evaluation.task_functions": "lmms_eval",
}
IMPORT_ALL_AND_DESCRIBE = """
import importlib, sys
from pathlib import Path
installed = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(installed), f"{name} is {module.__file__}"
from pipeline import describe
from pipeline.recipe import load_recipe
from preprocess.annotations.mix import load_mix
for recipe in (installed / "pipeline/recipes").glob("*.toml"):
    load_recipe(recipe, planning=True)
for mix in (installed / "preprocess/mixes").glob("*.toml"):
    load_mix(mix)
sys.argv = ["pipeline.describe", str(installed / "pipeline/recipes/emma_v2.toml")]
describe.main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline from a copy of the sources, because a build leaves files in the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_FILES:
        shutil.copy(REPOSITORY / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, source)
    [path] = out.glob("*.whl")
    return path


def pip(command: str, *words: str | Path) -> None:
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    done = python("-m", "pip", command, *offline, *words)
    assert done.returncode == 0, done.stdout + done.stderr


def python(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def package_files() -> dict[str, bytes]:
    paths = [path for name in PACKAGES for path in (REPOSITORY / name).rglob("*") if path.is_file()]
    return {
        path.relative_to(REPOSITORY).as_posix(): path.read_bytes() for path in paths if "__pycache__" not in path.parts
    }


def test_the_wheel_contains_exactly_the_files_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    files = package_files()
    assert sorted(packed) == sorted(files)
    assert packed == files


def test_every_module_recipe_and_mix_loads_from_the_installed_wheel(wheel, tmp_path):
    installed = tmp_path / "installed"
    pip("install", "--target", installed, wheel)
    paths = [name.removesuffix(".py").removesuffix("/__init__") for name in package_files() if name.endswith(".py")]
    names = [path.replace("/", ".") for path in paths]
    modules = [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = python("-c", IMPORT_ALL_AND_DESCRIBE, installed, *modules, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "emma_v2" in done.stdout
