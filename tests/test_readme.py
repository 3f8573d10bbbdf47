"""The README and the pages in docs/: links, commands, file names, and the Python example."""

import re
from pathlib import Path

import pytest

from pipeline.export import export_untrained
from pipeline.recipe import load_recipe
from tests.support.launch import REPOSITORY, fork_python

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
COMMAND = re.compile(r"python -m ([a-z_]+(?:\.[a-z_]+)*)|python ((?:preprocess|pipeline)/[a-z_/]+\.py)")


def targets(page: Path) -> list[str]:
    """Return the relative link and image targets of a page."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [target for target in found if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_resolves(page):
    assert [target for target in targets(page) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_names_a_module_that_exists(page):
    for module, script in COMMAND.findall(page.read_text(encoding="utf-8")):
        path = REPOSITORY / (script or module.replace(".", "/"))
        assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module or script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_that_a_page_names_exists(page):
    names = re.findall(
        r"`((?:model|preprocess|pipeline|ds_configs|slurm|tests|benchmarks)/[\w/.-]+)`", page.read_text()
    )
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


def test_the_python_examples_of_the_readme_load_the_model_and_print_an_answer(
    recipe_file, shards, raw_mix, tmp_path, capsys
):
    with_transformers, example = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    recipe = load_recipe(recipe_file, [f"data.shards={shards}"], planning=True)
    export_untrained(recipe, tmp_path / "model", with_alignment=False)
    image = next((raw_mix.parent / "images").glob("*.png"))
    for name, path in (("runs/demo/model", tmp_path / "model"), ("runs/demo/raw/held_out/0000.jpg", image)):
        assert example.count(name) == 1
        example = example.replace(name, str(path))
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
    program = with_transformers.replace("runs/demo/model", str(tmp_path / "model"))
    program += "print(model.config.emma['model']['name'], processor.tokenizer.padding_side)"
    done = fork_python("-c", program, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stdout.splitlines()[-1] == "tiny_v2 left", done.stderr
