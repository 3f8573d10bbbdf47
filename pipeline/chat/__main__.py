"""Serve a local page on which you drop an image and ask a model about it.

python -m pipeline.chat models/v2
python -m pipeline.chat models/v2 --port 8080 --temperature 0.7

Besides the answers, the page shows the magnitude of the model's visual states. It also shows the redrawn image, if the
folder has the decoder (python -m pipeline.export RUN MODEL --with-alignment).

The page needs the extra [web], but no internet. Only this machine can open it. Before you open it on another machine,
forward the port from there: ssh -L 7860:localhost:7860 MACHINE
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from model.errors import UserError, run_cli
from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.requests import Sampling

ADDRESS = "127.0.0.1"  # other machines cannot open the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder written by pipeline.export")
    parser.add_argument("--port", type=int, default=7860, help="port on this machine (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="limit per answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed samples the same answers")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    args = parser.parse_args()
    for option, value, valid, expected in (
        ("--port", args.port, 1 <= args.port <= 65535, "1 to 65535"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "at least 0"),
    ):
        if not valid:
            raise UserError(f"{option}: found {value}, expected {expected}")
    if find_spec("gradio") is None:
        raise UserError(
            "the page needs the package gradio, which is not installed. Install it: pip install -e '.[web]'"
        )
    try:
        socket.create_server((ADDRESS, args.port)).close()
    except OSError as error:
        raise UserError(
            f"--port: {args.port} cannot be opened ({os.strerror(error.errno or 0)}). Choose another port."
        ) from None
    sampling = Sampling(temperature=args.temperature, seed=args.seed)
    engine = InferenceEngine(*load(args.model, args.device), max_batch=1, sampling=sampling)
    with tempfile.TemporaryDirectory() as folder:
        prepare_environment(folder)
        from pipeline.chat.page import build_page, serve

        page = build_page(engine, title=args.model.absolute().name, max_new_tokens=args.max_new_tokens)
        serve(page, ADDRESS, args.port)


def prepare_environment(folder: str) -> None:
    """Set the variables that gradio reads. Call this before importing gradio.

    Args:
        folder: Folder for the images that users drop. Gradio's default is the same for all users of a machine.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_OFFLINE="1")
    for name in ("no_proxy", "NO_PROXY"):  # gradio requests its own page when it starts, which must not use a proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), ADDRESS, "localhost"]))


if __name__ == "__main__":
    run_cli(main)
