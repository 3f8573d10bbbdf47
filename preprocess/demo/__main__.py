"""Command `python -m preprocess.demo ROOT`, which writes the demo's raw data."""

from __future__ import annotations

from model.errors import run_cli
from preprocess.demo.mix import main

if __name__ == "__main__":
    run_cli(main)
