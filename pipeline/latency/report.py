"""Markdown tables of measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.latency.peers import PEERS
from pipeline.latency.results import Row

# Tab. 4 of the paper, on an A100 with 40 GB: model, seconds per answer, tokens per second.
PAPER = {
    "emma_v2": ("EMMA-V2", 1.71, 149.96),
    "cobra": ("Cobra", 1.84, 138.95),
    "phi2_siglip": ("TinyLLaVA", 6.17, 41.46),
    "llama_clip": ("MobileVLM V2", 6.50, 39.36),
}
PAPER_HEAD = ["model", "graph", "answers", "T_avg s", "N_avg tok/s", "paper's model", "T_avg s", "N_avg tok/s"]
BATCH_HEAD = [
    *("model", "batch", "graph", "states", "encoders ms", "prefill ms", "first token ms", "ms per token"),
    *("p50", "p90", "p99", "answer s", "tok/s", "decoding tok/s", "share of ceiling", "peak GiB", "answers"),
]


def markdown(rows: Sequence[Row], environment: dict[str, Any], tokens: int) -> str:
    """Return the tables of one environment: the paper's protocol, each batch size, and each length.

    Args:
        rows: Rows of this environment.
        environment: Card and versions of packages.
        tokens: Length of the answers in the first two tables.
    """
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    batches = sorted((row for row in rows if row["tokens"] == tokens), key=table_order)
    measured = [row for row in batches if "error" not in row]
    lengths = [row for row in sorted(rows, key=table_order) if row["batch"] == 1 and "error" not in row]
    parts = [f"Machine: {environment['card']}; {versions}."]
    if bandwidths := sorted({f"{row['bandwidth'] / 1e12:.2f}" for row in measured}):
        parts[0] += f" Copy bandwidth: {' and '.join(bandwidths)} TB/s."
    if protocol := [_paper_cells(row) for row in measured if _is_protocol(row)]:
        parts += ["The protocol of the paper's Tab. 4, and the paper's rows on an A100:", _table(PAPER_HEAD, protocol)]
    if batches:
        head = f"Answers of {tokens} tokens to a question about an image:"
        parts += [head, _table(BATCH_HEAD, [_batch_cells(row) for row in batches])]
    if len({row["tokens"] for row in lengths}) > 1:
        parts += ["Tokens per second at batch 1, by length of the answer:", _length_table(lengths)]
    return "\n\n".join(parts) + "\n"


def label(row: Row) -> str:
    """Return the name of what a row measures, without batch size, graph and states."""
    if row["implementation"] == "mamba_ssm":
        return f"mamba_ssm, {row['model']} without image encoder"
    return f"{row['model']} ({PEERS[row['model']].like}'s size)" if row["model"] in PEERS else row["model"]


def table_order(row: Row) -> tuple[Any, ...]:
    """Return the key by which rows are sorted: our models first, then by model, batch size and length."""
    return row["implementation"] != "ours", label(row), row["batch"], row["tokens"], row["state"], not row["graph"]


def _is_protocol(row: Row) -> bool:
    ours = row["implementation"] == "ours" and row["state"] == "fp32"
    return row["batch"] == 1 and row["model"] in PAPER and (ours or row["implementation"] == "transformers")


def _paper_cells(row: Row) -> list[str]:
    name, seconds, rate = PAPER[row["model"]]
    ours = [label(row), _graph(row), str(row["repeats"]), f"{row['answer_s']:.3f}", f"{row['tokens_per_s']:.1f}"]
    return [*ours, name, f"{seconds:.2f}", f"{rate:.2f}"]


def _batch_cells(row: Row) -> list[str]:
    head = [label(row), str(row["batch"]), _graph(row), row["state"]]
    if "error" in row:
        return [*head, f"not measured: {row['error']}".replace("|", "/"), *[""] * (len(BATCH_HEAD) - len(head) - 1)]
    times = [row["towers_ms"], row["prefill_ms"], row["first_token_ms"]]
    per_token = [row["token_ms"], *(row.get(f"p{percent}_ms") for percent in (50, 90, 99))]
    rates = [f"{row['tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.0f}", f"{row['share']:.0%}"]
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    cells = [f"{value:.1f}" for value in times] + ["" if value is None else f"{value:.3f}" for value in per_token]
    fewer = f" × {row['measured_tokens']} tokens" if row["measured_tokens"] < row["tokens"] else ""
    return [*head, *cells, f"{row['answer_s']:.3f}", *rates, peak, f"{row['repeats']}{fewer}"]


def _length_table(rows: Sequence[Row]) -> str:
    """Return the tokens per second, averaged over an answer, with a column for each length of the answer."""
    lengths = sorted({row["tokens"] for row in rows})
    rates: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        rates.setdefault((label(row), _graph(row), row["state"]), {})[row["tokens"]] = f"{row['tokens_per_s']:.1f}"
    body = [[*key, *(found.get(length, "") for length in lengths)] for key, found in rates.items() if len(found) > 1]
    return _table(["model", "graph", "states", *(f"{length} tokens" for length in lengths)], body)


def _graph(row: Row) -> str:
    return "yes" if row["graph"] else "no"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
