"""Rules for the code layout: import layers, the one place that imports each dependency, and size limits."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY

PACKAGES = ("model", "preprocess", "pipeline")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
OTHERS = sorted(path for folder in ("tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
PUBLISHED = sorted((REPOSITORY / "model/published").glob("*_emma.py"))
FOLDERS = sorted({path.parent for path in SOURCES})

MAY_IMPORT = {"model": {"model"}, "preprocess": {"preprocess", "model"}, "pipeline": set(PACKAGES)}
# Preprocessing may import only these modules of the model, because they do not import torch.
MODEL_MODULES_OF_PREPROCESS = {"model.config", "model.errors", "model.hashing", "model.presets"}

# A module or subpackage may import only from itself and from the layers listed before its own layer.
LAYERS: dict[str, list[set[str]]] = {
    "preprocess": [
        {"file_kinds"},
        {"atomic", "prompts", "rejects", "remote_path", "socket_folder", "strict_toml"},
        {"demo", "images"},
        {"annotations", "shards"},
        {"progress"},
        {"builder"},
        {"build_shards", "shardset"},
    ],
    "pipeline": [
        {"config", "errors", "flops", "step_profile", "inference"},
        {"distributed", "recipe"},
        {"data", "evaluation", "initial_model", "lr_schedule", "optimizer"},
        {"engine", "prefetch"},
        {"zero"},
        {"step"},
        {"activation_memory", "checkpoint", "metrics", "validation"},
        {"publishing"},
        {"figures"},
        {"visualization"},
        {"chat", "evaluate", "generate", "latency", "visualize"},
        {"describe", "dry_run", "export", "run", "status"},
        {"demo", "loop"},
        {"train"},
    ],
}

# For each dependency, the only file or folder that may import it, or several of them.
DOORS: dict[str, str | tuple[str, ...]] = {
    "causal_conv1d": "model/kernels/dispatch.py",
    "deepspeed": "pipeline/engine.py",
    "fsspec": "preprocess/remote_path.py",
    "gradio": "pipeline/chat/",
    "lmms_eval": "pipeline/evaluation/",
    "mamba_ssm": ("model/kernels/dispatch.py", "pipeline/latency/mamba_ssm_loop.py"),
    "matplotlib": "pipeline/figures/",
    "psutil": "pipeline/demo/",
    "ray": "preprocess/builder/on_ray.py",
    "simplejpeg": "preprocess/images/codec.py",
    "timm": "model/vision.py",
    "transformers": ("model/published/", "pipeline/latency/peers.py"),
    "triton": "model/kernels/",
    "wandb": "pipeline/metrics/wandb_logger.py",
    "webdataset": "preprocess/shards/writer.py",
}
# Attributes of DeepSpeed objects that are not part of DeepSpeed's documented interface.
DEEPSPEED_INTERNALS = re.compile(
    r"\.(ds_(id|numel|shape|status|tensor)|partition_numel|fp16_\w*groups\w*|fp32_\w*groups\w*|single_partition_of_\w+|round_robin_\w+"
    r"|sub_group_to_group_id|grad_partitions\w+|checkpoint_event_\w+|update_lp_params|optimizer\.optimizer)\b"
)

MAX_FILES = {"model": 16, "preprocess": 13, "pipeline": 24}
MAX_FILES_OF_A_PACKAGE = 12
MAX_LINES, MAX_FUNCTION_LINES, MAX_TEST_NAME = 400, 50, 80


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> list[tuple[str, int]]:
    """Return each module that a file imports, also inside functions, with its number of leading dots."""
    modules = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            modules += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append((node.module or "", node.level))
    return modules


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full names that a file imports; for `from pipeline import step`, this is pipeline.step."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this machine has no git checkout here, so there is no list of its files")
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


# -- Imports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_between_packages_go_only_from_pipeline_to_preprocess_to_model(path):
    package = name_of(path).split("/")[0]
    ours = {module for module, _ in imports(path) if module.split(".")[0] in PACKAGES}
    assert {module.split(".")[0] for module in ours} <= MAY_IMPORT[package]
    if package == "preprocess":
        assert {module for module in ours if module.startswith("model")} <= MODEL_MODULES_OF_PREPROCESS


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_only_from_lower_layers(package):
    layer_of = {name: number for number, layer in enumerate(LAYERS[package]) for name in layer}
    root = REPOSITORY / package
    assert {path.stem for path in root.iterdir() if list(path.glob("*.py")) or path.suffix == ".py"} - {"__init__"} == (
        layer_of.keys()
    ), "assign each module and package to a layer"
    for path in (path for path in SOURCES if path.is_relative_to(root) and path != root / "__init__.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for name in imported_names(path):
            top, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if top == package and imported != own:
                assert layer_of[imported] < layer_of[own], f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", sorted(set(SOURCES) - set(PUBLISHED)), ids=name_of)
def test_all_imports_in_the_packages_are_absolute(path):
    assert [module for module, dots in imports(path) if dots] == []


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_published_code_imports_only_torch_transformers_and_its_neighbours(path):
    """These files are copied into exported folders, where transformers follows only imports of the form `.name`."""
    assert {module for module, dots in imports(path) if dots} <= {other.stem for other in PUBLISHED}
    assert {dots for _, dots in imports(path)} <= {0, 1}
    top_level = {module.split(".")[0] for module, dots in imports(path) if not dots}
    assert top_level - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_the_import_graph_of_our_modules_has_no_cycles():
    names = {name_of(path).removesuffix(".py").replace("/", "."): path for path in SOURCES}
    unfinished = {name: {module for module, _ in imports(path)} & set(names) for name, path in names.items()}
    while leaves := {name for name, needs in unfinished.items() if not needs}:
        unfinished = {name: needs - leaves for name, needs in unfinished.items() if name not in leaves}
    assert unfinished == {}


@pytest.mark.parametrize("dependency", DOORS)
def test_each_heavy_dependency_is_imported_by_one_file_or_folder_only(dependency):
    users = {name_of(path) for path in SOURCES if dependency in {module.split(".")[0] for module, _ in imports(path)}}
    assert [user for user in users if not user.startswith(DOORS[dependency])] == []


def test_only_pipeline_zero_accesses_deepspeeds_undocumented_attributes():
    users = {name_of(path) for path in SOURCES if DEEPSPEED_INTERNALS.search(path.read_text())}
    assert users == {"pipeline/zero.py"}


def test_presets_and_prompts_can_be_imported_without_torch():
    program = "import sys, model.presets, preprocess.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


def test_no_module_changes_sys_path():
    edits = re.compile(r"sys\.path\s*(\.(insert|append|extend)|\[|\+?=)")
    assert [name_of(path) for path in SOURCES if edits.search(path.read_text())] == []


def test_no_file_in_tests_or_benchmarks_imports_conftest():
    helpers = [path for path in OTHERS if path.name != "conftest.py"]
    assert [name_of(path) for path in helpers if any("conftest" in module for module, _ in imports(path))] == []


# -- Files and functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_each_package_has_at_most_its_allowed_number_of_files(folder):
    assert len(list(folder.glob("*.py"))) <= MAX_FILES.get(name_of(folder), MAX_FILES_OF_A_PACKAGE)


@pytest.mark.parametrize("path", SOURCES + OTHERS, ids=name_of)
def test_files_and_functions_stay_below_their_maximum_number_of_lines(path):
    assert len(path.read_text().splitlines()) < MAX_LINES
    lines = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions(path)}
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_test_names_have_at_most_80_characters():
    names = [function.name for path in OTHERS if path.name.startswith("test_") for function in functions(path)]
    assert [name for name in names if len(name) > MAX_TEST_NAME] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_has_the_same_name_as_a_standard_library_module(path):
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stem == "__init__"], ids=name_of)
def test_every_init_file_contains_only_a_docstring(path):
    body = parse(path).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, [])) is not None


def test_no_tracked_file_contains_an_absolute_path_of_this_machine_or_a_home_folder():
    machine = re.compile(rf"{re.escape(str(REPOSITORY))}/|/(home|Users)/\w+/")
    texts = {name: (REPOSITORY / name).read_bytes().decode(errors="ignore") for name in tracked_files()}
    assert [f"{name}: {match[0]}" for name, text in texts.items() for match in machine.finditer(text)] == []
