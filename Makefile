# Every target installs what it needs, so `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTS_INSTALLED := $(VENV)/.tests-installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

.PHONY: help install demo test lint soak
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(INSTALLED)  ## create .venv and install the project in it (PYTHON=python3.12 selects the interpreter)

demo: $(INSTALLED)  ## run the whole chain on the CPU: data, shards, training, a kill, resuming, answers
	@$(BIN)/python -m pipeline.demo

test: $(TESTS_INSTALLED)  ## run the tests (ARGS="-k slurm" selects some)
	@$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)  ## check formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

soak: $(INSTALLED)  ## run the soak tests, which kill builds and trainings at random moments (ARGS="--kills 5")
	@set -e; for program in tests/programs/soak_*.py; do $(BIN)/python -m tests.programs.$$(basename $$program .py) $(ARGS); done

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 or newer is required; make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot create virtual environments; apt-get install python3-venv"; rm -rf $(VENV); exit 2; }
	@echo "installing into $(VENV): about 6 GB with the CUDA libraries; this takes minutes"
	@$(PIP_INSTALL) '.[dev]'
	@touch $@

$(TESTS_INSTALLED): $(INSTALLED)
	@echo "installing the extras that the tests need into $(VENV)"
	@$(PIP_INSTALL) '.[dev,eval,web]'
	@touch $@
