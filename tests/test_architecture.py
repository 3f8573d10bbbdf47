"""The lines that the layout draws: who imports whom, one door per heavy dependency, files that a reader can take in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("model", "preprocess", "pipeline")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
MAY_IMPORT = {"model": {"model"}, "preprocess": {"preprocess", "model"}, "pipeline": set(PACKAGES)}
MAX_LINES = 400

DOORS = {
    "mamba_ssm": {"model/kernels/dispatch.py"},
    "causal_conv1d": {"model/kernels/dispatch.py"},
    "timm": {"model/vision.py"},
    "transformers": {"model/transformers_layout.py"},
    "ray": {"preprocess/builder/on_ray.py"},
    "webdataset": {"preprocess/shards/writer.py"},
    "simplejpeg": {"preprocess/images/codec.py"},
    "fsspec": {"preprocess/remote_path.py"},
    "deepspeed": {"pipeline/engine.py"},
    "wandb": {"pipeline/metrics/wandb_logger.py"},
    "matplotlib": {"pipeline/metrics/figures.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with the number of leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the project's own files")
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_package_imports_only_itself_and_what_stands_before_it(path):
    package = name_of(path).split("/")[0]
    ours = {module for module, _ in imports(path) if module.split(".")[0] in PACKAGES}
    assert {module.split(".")[0] for module in ours} <= MAY_IMPORT[package]
    if package == "preprocess":
        assert {module for module in ours if module.startswith("model")} <= {
            "model.config",
            "model.errors",
            "model.hashing",
            "model.presets",
        }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_are_absolute(path):
    assert [module for module, dots in imports(path) if dots] == []


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_has_one_door(dependency):
    users = {name_of(path) for path in SOURCES if dependency in {module.split(".")[0] for module, _ in imports(path)}}
    assert users <= DOORS[dependency]


def test_the_presets_are_readable_without_torch():
    program = "import sys, model.presets, preprocess.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


def test_modules_import_each_other_without_cycles():
    names = {name_of(path).removesuffix(".py").replace("/", "."): path for path in SOURCES}
    unfinished = {name: {module for module, _ in imports(path)} & set(names) for name, path in names.items()}
    while leaves := {name for name, needs in unfinished.items() if not needs}:
        unfinished = {name: needs - leaves for name, needs in unfinished.items() if name not in leaves}
    assert unfinished == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_hides_one_of_the_standard_library(path):
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stem == "__init__"], ids=name_of)
def test_a_package_file_holds_its_docstring_and_nothing_else(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, [])) is not None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_enough_to_be_read(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


def test_nothing_edits_the_import_path():
    edits = re.compile(r"sys\.path\s*(\.(insert|append|extend)|\[|\+?=)")
    assert [name_of(path) for path in SOURCES if edits.search(path.read_text())] == []


def test_no_tracked_file_names_a_machine():
    """Paths of whoever wrote a file work for nobody else."""
    machine = re.compile(rf"{re.escape(str(REPOSITORY))}/|/(home|Users)/\w+/")
    texts = {name: (REPOSITORY / name).read_bytes().decode(errors="ignore") for name in tracked_files()}
    assert [f"{name}: {match[0]}" for name, text in texts.items() for match in machine.finditer(text)] == []
