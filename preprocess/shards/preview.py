"""One self-contained HTML page of a shard set: samples as the model gets them, and the rejects with their reasons."""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from model.errors import UserError, first_line
from preprocess.atomic import publish
from preprocess.images.codec import encode_jpeg
from preprocess.prompts import Tokenizer
from preprocess.rejects import REASONS, Reject, Rejected, read_rejects
from preprocess.shards.manifest import REJECTS, TOKENIZER, Manifest, load_index
from preprocess.shards.sample import Sample, from_payloads, sample_pixels

PAGE = Path(__file__).with_name("preview.html")
MOST_REJECTS = 500


def write_preview(folder: Path, path: Path, num_samples: int) -> str:
    """Writes the page; returns where and how much it shows. Raises: UserError if the set is damaged."""
    manifest = Manifest.load(folder)
    page, shown = _page(folder, manifest, num_samples)
    publish(path, page.encode("utf-8", errors="replace"))
    return f"{path}: {shown} of {manifest.counts['samples']} samples, {manifest.counts['rejects']} rejects"


def _page(folder: Path, manifest: Manifest, num_samples: int) -> tuple[str, int]:
    index = load_index(folder)
    with _damage_explained(folder, TOKENIZER):
        tokenizer = Tokenizer((folder / TOKENIZER).read_bytes(), TOKENIZER)
    with _damage_explained(folder, REJECTS):
        rejects = choose_rejects(folder / REJECTS, MOST_REJECTS)
    rows = choose_rows(np.asarray(index.column("source").to_pylist(), dtype=object), num_samples)
    samples = [_read(folder, manifest, index.slice(row, 1).to_pylist()[0]) for row in rows]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(folder.resolve().name),
        facts=_facts(manifest),
        sources="".join(f"<option>{html.escape(name)}</option>" for name in manifest.sources),
        cards="".join(_card(sample, tokenizer, manifest.image["px"]) for sample in samples),
        shown=len(samples),
        total=manifest.counts["samples"],
        rejects="".join(map(_reject_row, rejects)),
        num_rejects=manifest.counts["rejects"],
        shown_rejects=len(rejects),
    )
    return page, len(samples)


@contextlib.contextmanager
def _damage_explained(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, Rejected) as error:
        raise UserError(
            f"{folder / name} is missing or damaged ({first_line(error)}); "
            f"`python -m preprocess.shardset verify {folder}` names all that is, and what to do"
        ) from None


def choose_rejects(path: Path, count: int) -> list[Reject]:
    """Some of each reason of each source, in their order."""
    numbers: dict[tuple[str, str], int] = {}
    kinds = [numbers.setdefault((reject.source, reject.reason), len(numbers)) for reject in read_rejects(path)]
    chosen = set(choose_rows(np.asarray(kinds, dtype=np.int32), count))
    return [reject for number, reject in enumerate(read_rejects(path)) if number in chosen]


def choose_rows(groups: np.ndarray, count: int) -> list[int]:
    """Rows spread evenly over each group (such as a source), groups served in turn until there are `count`."""
    rows = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups.tolist())]
    shares = Counter(itertools.islice(_turns([len(of_one) for of_one in rows]), count))
    chosen = [
        rows[group][np.linspace(0, len(rows[group]) - 1, share).round().astype(int)] for group, share in shares.items()
    ]
    return sorted(int(row) for of_one in chosen for row in of_one)


def _turns(sizes: list[int]) -> Iterator[int]:
    for lap in range(max(sizes, default=0)):
        yield from (group for group, size in enumerate(sizes) if lap < size)


def _read(folder: Path, manifest: Manifest, row: dict[str, Any]) -> Sample:
    name = manifest.shards[row["shard"]].name
    with _damage_explained(folder, name), (folder / name).open("rb") as tar:
        tokens, meta, image = (
            os.pread(tar.fileno(), row[f"{part}_bytes"], row[f"{part}_offset"]) for part in ("tokens", "meta", "image")
        )
        return from_payloads(row["key"], tokens, meta, image or None)


def _facts(manifest: Manifest) -> str:
    counts = manifest.counts
    facts = {
        "model": manifest.model,
        "template": manifest.template,
        "tokenizer": manifest.tokenizer["name"],
        "samples": f"{counts['samples']:,}",
        "pictures": f"{counts['pictures']:,}",
        "text-only": f"{counts['text_only']:,}",
        "text tokens": f"{counts['text_tokens']:,}",
        "supervised": f"{counts['supervised_tokens'] / max(1, counts['text_tokens']):.0%}",
        "rejected rows": f"{counts['rejects']:,} of {counts['rows']:,}",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts.items())


def _card(sample: Sample, tokenizer: Tokenizer, image_px: int) -> str:
    picture = f'<img loading="lazy" alt="" src="{_data_uri(sample, image_px)}">' if sample.image is not None else ""
    kind = "picture" if sample.image is not None else "text"
    caption = f"{sample.source} · row {sample.row} · id {sample.id} · key {sample.key}"
    return (
        f'<article data-source="{html.escape(sample.source)}" data-kind="{kind}">{picture}'
        f'<div class="text"><p class="turns">{_turns_html(sample, tokenizer)}</p>'
        f'<p class="from">{html.escape(caption)}<br>{html.escape(sample.picture or "no picture")} · '
        f"{len(sample.tokens)} tokens, {sample.num_supervised_tokens} supervised</p></div></article>"
    )


def _data_uri(sample: Sample, image_px: int) -> str:
    jpeg = encode_jpeg(sample_pixels(sample, image_px))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _turns_html(sample: Sample, tokenizer: Tokenizer) -> str:
    """The tokens as text, run by run: marked where they are supervised."""
    parts, end = [], 0
    for start, stop in sample.spans:
        parts += [("span", end, start), ("mark", start, stop)]
        end = stop
    parts.append(("span", end, len(sample.tokens)))
    return "".join(
        f"<{tag}>{html.escape(tokenizer.decode(sample.tokens[start:stop].tolist(), skip_special_tokens=False))}</{tag}>"
        for tag, start, stop in parts
        if stop > start
    )


def _reject_row(reject: Reject) -> str:
    why = REASONS.get(reject.reason, "")
    cells = (reject.source, str(reject.row), reject.id, reject.reason, reject.detail)
    return (
        f'<tr data-source="{html.escape(reject.source)}" title="{html.escape(why)}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
    )
