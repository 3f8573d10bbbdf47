"""Measure how fast models answer: the protocol of the paper's Tab. 4, time by phase, and batch sizes.

    python -m pipeline.latency emma_v2 --markdown latency.md                # full size, random weights; needs a GPU
    python -m pipeline.latency models/v2 --peers --batches 1 64             # an exported model, without peers
    python -m pipeline.latency emma_v2 --limit 400 --seconds 2              # stop after seven minutes; resumes
    python -m pipeline.latency --json latency.json --markdown latency.md    # print the rows of an earlier call

A request is one image with "Describe this image in detail", answered by exactly 256 tokens. Presets and peers have
random weights, because the time does not depend on the weights. A model with CUDA graphs at batch 1 answers 200 times,
as in the paper. All other rows are repeated for --seconds, and at least 3 times. If 3 whole answers would take longer,
fewer tokens are generated. The time of an answer is then computed from the time per token, which is the same at every
position.

Each row is written to the JSON file as soon as it is measured. The same command resumes: it measures the rows
that are missing for this card and these package versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.errors import UserError, did_you_mean, run_cli
from model.presets import PRESETS
from pipeline.latency.cases import Selection
from pipeline.latency.measure import WARM_UP_TOKENS, Case, Effort
from pipeline.latency.own import STATES
from pipeline.latency.peers import PEERS
from pipeline.latency.report import label, markdown, table_order
from pipeline.latency.results import Results, Row
from pipeline.latency.run import measure_missing

LOOP = "mamba_ssm"
DEFAULT_PEERS = ("cobra", "phi2_siglip", "llama_clip", LOOP)


def main() -> None:
    args = parse_args()
    results = Results(args.json)
    if args.models:
        run(args, results)
    if results.latest is None:
        raise UserError(f"{args.json}: holds no rows. Name a preset or an exported folder to measure")
    rows = results.of(results.latest)
    tables = markdown(rows, results.latest, args.tokens)
    print(f"\n{tables}", end="")
    if args.markdown:
        args.markdown.write_text(tables, encoding="utf-8")
    if args.figure:
        draw(rows, args.figure, card=results.latest["card"], tokens=args.tokens)


def run(args: argparse.Namespace, results: Results) -> None:
    """Measure the cases that the file does not hold yet, and add their rows to it."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    graphs = device.type == "cuda"
    if not graphs:
        print("There is no CUDA GPU, so the rows with CUDA graphs and those of mamba_ssm are left out.")
    selection = Selection(
        models=args.models,
        others=[peer for peer in args.peers if peer in PRESETS and peer not in args.models],
        peers=[peer for peer in args.peers if peer in PEERS],
        loop=LOOP in args.peers and graphs,
        states=args.states or (["fp32", "bf16"] if graphs else ["fp32"]),
        dtype="bf16" if graphs else "fp32",
        batches=args.batches,
        lengths=args.lengths,
        tokens=args.tokens,
        graphs=graphs,
    )
    protocol = Case(model=args.models[0], implementation="ours", graph=True, state="fp32", batch=1, tokens=args.tokens)

    def effort(case: Case) -> Effort:
        paper = replace(protocol, model=case.model) == case and case.model in args.models
        return Effort(seconds=args.seconds, repeats=args.repeats if paper else 0)

    measure_missing(selection.cases(), results, device, effort=effort, limit=args.limit)


def draw(rows: Sequence[Row], path: Path, *, card: str, tokens: int) -> None:
    """Draw tokens per second against batch size and length. A curve has at least two points."""
    from pipeline.figures.latency import SpeedCurve, draw_speed

    def curves(rows: Sequence[Row], x: str) -> list[SpeedCurve]:
        points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
        for row in rows:
            bf16 = ", bf16 states" if row["implementation"] == "ours" and row["state"] == "bf16" else ""
            points.setdefault((label(row) + bf16, row["graph"]), []).append((row[x], row["tokens_per_s"]))
        found = {key: sorted(values) for key, values in points.items() if len(values) > 1}
        return [SpeedCurve(name=name, graph=graph, points=values) for (name, graph), values in found.items()]

    measured = sorted((row for row in rows if "error" not in row), key=table_order)
    by_batch = curves([row for row in measured if row["tokens"] == tokens], "batch")
    by_length = curves([row for row in measured if row["batch"] == 1], "tokens")
    draw_speed(by_batch, by_length, path, title=card, tokens=tokens)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="exported folders or presets; none: print the rows of --json")
    add("--peers", nargs="*", default=DEFAULT_PEERS, metavar="NAME", help=f"presets, {', '.join(PEERS)}, or {LOOP}")
    add("--states", nargs="+", choices=STATES, help="types of our states (default: fp32 and bf16, on a CPU fp32)")
    add("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128], help="default: 1, 2, 4, … 128")
    add("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192], help="default: 256, … 8192")
    add("--tokens", type=int, default=256, help="tokens of an answer for --batches (default %(default)s)")
    add("--seconds", type=float, default=5.0, help="time to repeat each row (default %(default)s)")
    add("--repeats", type=int, default=200, help="answers of a MODEL at batch 1 with the graph (default %(default)s)")
    add("--limit", type=float, default=0.0, metavar="SECONDS", help="begin no row after this time (default: no limit)")
    add("--json", type=Path, default=Path("latency.json"), metavar="FILE", help="rows (default %(default)s)")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    add("--figure", type=Path, metavar="FILE", help="draw tokens/s against batch size and length to this PNG")
    add("--device", choices=("auto", "cpu"), default="auto", help="default: a GPU if there is one")
    args = parser.parse_args()
    known = [*PRESETS, *PEERS, LOOP]
    for peer in args.peers:
        if peer not in known:
            raise UserError(f"--peers {peer}: not known{did_you_mean(peer, known)}")
    for option, values in {"--batches": args.batches, "--lengths": args.lengths, "--repeats": [args.repeats]}.items():
        if min(values, default=1) < 1:
            raise UserError(f"{option} {min(values)}: expected numbers above 0")
    if min([args.tokens, *args.lengths]) < WARM_UP_TOKENS:
        raise UserError(
            f"--tokens, --lengths: found {min([args.tokens, *args.lengths])}, expected at least {WARM_UP_TOKENS}"
        )
    return args


if __name__ == "__main__":
    run_cli(main)
