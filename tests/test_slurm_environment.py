"""The Python environment of the batch scripts, and shellcheck of all scripts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY

SCRIPTS = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "slurm").glob("*.sh"))
PRINT_ITSELF = '#!/bin/sh\necho "$0 $*" >&2\nexit 3\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with fake pythons in .venv, a conda environment and a container, which print their own path."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    for name in (".venv/bin", "conda/bin", "container"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "python").write_text(PRINT_ITSELF)
        (tmp_path / name / "python").chmod(0o755)
        (tmp_path / name / "activate").write_text(f'[ "$UNSET$*" ] || PATH={tmp_path / name}:$PATH\n')
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "entered"),
    [
        ({}, ".venv/bin"),
        ({"EMMA_ENV": "conda/bin/activate"}, "conda/bin"),
        ({"EMMA_ENV": "module() { :; }; module load cuda; . conda/bin/activate; set -- words"}, "conda/bin"),
        ({"EMMA_CONTAINER": "env PATH=container:/usr/bin:/bin"}, "container"),
    ],
    ids=["default", "a file", "a shell command", "a container"],
)
def test_emma_env_and_emma_container_select_environment_and_container(checkout, variables, entered):
    command = ["bash", "slurm/train_emma.sh", "recipe.toml"]
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.strip().endswith(f"{entered}/python -m pipeline.recipe recipe.toml --get run.dir")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "environment" not in path])
@pytest.mark.parametrize("caller", ["checkout", "spool"])
def test_each_script_changes_to_its_checkout_whatever_the_shell_does_with_cd(tmp_path, script, caller):
    """A folder in CDPATH also has a folder slurm/, BASH_ENV redefines cd, and the path of the checkout has spaces."""
    here, elsewhere = tmp_path / "my check out", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (tmp_path / "bash_env").write_text("cd() { builtin cd /; }\n")
    environment = {"PATH": os.environ["PATH"], "CDPATH": str(elsewhere), "BASH_ENV": str(tmp_path / "bash_env")}
    environment |= {"EMMA_ENV": 'echo "in $PWD"; exit 7', "GREP_OPTIONS": "-v"}
    if caller == "spool" and "install" not in script:  # SLURM runs a copy of a batch script
        environment["SLURM_SUBMIT_DIR"] = str(here)
        script = shutil.copy(here / script, tmp_path / "slurm_script")
    done = subprocess.run(["bash", script], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"in {here}\n", "")


def test_the_training_script_without_a_recipe_reports_an_error(checkout):
    done = subprocess.run(["bash", "slurm/train_emma.sh"], cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no recipe given; --help has examples\n")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_reports_no_problem_in_the_scripts():
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
