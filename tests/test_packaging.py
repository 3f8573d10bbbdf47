"""The wheel holds every file of the packages, and what it installs works without the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, run_python

PACKAGES = ("model", "preprocess", "pipeline", "ds_configs")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
IMPORT_ALL = """
import importlib, pathlib, sys
installed = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(installed), f"{name} is {module.__file__}"
from pipeline.recipe import load_recipe
from preprocess.annotations.mix import load_mix
for recipe in (installed / "pipeline/recipes").glob("*.toml"):
    load_recipe(recipe, planning=True)
for mix in (installed / "preprocess/mixes").glob("*.toml"):
    load_mix(mix)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline in a copy, since a build leaves files in the tree."""
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
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *offline, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def package_files() -> dict[str, bytes]:
    paths = [path for name in PACKAGES for path in (REPOSITORY / name).rglob("*") if path.is_file()]
    return {
        path.relative_to(REPOSITORY).as_posix(): path.read_bytes() for path in paths if "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_files_of_the_packages_and_no_others(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    files = package_files()
    assert sorted(packed) == sorted(files)
    assert packed == files


def test_every_module_recipe_and_mix_loads_from_the_installed_wheel(wheel, tmp_path):
    installed = tmp_path / "installed"
    pip("install", "--target", installed, wheel)
    modules = [
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in package_files()
        if name.endswith(".py")
    ]
    assert {"pipeline.train", "pipeline.export", "preprocess.build_shards"} <= set(modules)
    done = run_python("-c", IMPORT_ALL, installed, *modules, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr


def test_a_command_runs_from_the_installed_wheel(wheel, tmp_path):
    installed = tmp_path / "installed"
    pip("install", "--target", installed, wheel)
    recipe = installed / "pipeline/recipes/emma_v2.toml"
    done = run_python("-m", "pipeline.describe", recipe, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "emma_v2" in done.stdout
