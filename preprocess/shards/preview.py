"""The preview page of a shard set: a self-contained HTML file with samples as the model sees them, and rejects."""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from model.errors import UserError, first_line
from preprocess.atomic import publish
from preprocess.images.codec import encode_jpeg
from preprocess.prompts import Tokenizer
from preprocess.rejects import REASONS, Reject, Rejected, read_rejects
from preprocess.shards.folder import TOKENIZER, ShardFolder
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.sample import Sample, from_payloads, sample_pixels

PAGE = Path(__file__).with_name("preview.html")
MAX_REJECTS = 500


def write_preview(folder: PathLike[str] | str, page: Path, num_samples: int) -> str:
    """Write the preview page. Return a line with the numbers of samples and rejects. Raises: UserError for damage."""
    manifest = Manifest.load(folder)
    text, shown = _page(ShardFolder(Path(folder)), manifest, num_samples)
    publish(page, text.encode("utf-8", errors="replace"))
    return f"{page}: {shown} of {manifest.counts['samples']} samples, {manifest.counts['rejects']} rejects"


def _page(folder: ShardFolder, manifest: Manifest, num_samples: int) -> tuple[str, int]:
    index = load_index(folder)
    with _explain_damage(folder, folder.tokenizer):
        tokenizer = Tokenizer(folder.tokenizer.read_bytes(), TOKENIZER)
    with _explain_damage(folder, folder.rejects):
        rejects = choose_rejects(folder.rejects, MAX_REJECTS)
    rows = choose_rows(np.asarray(index.column("source").to_pylist(), dtype=object), num_samples)
    samples = [_read_sample(folder, manifest, index.slice(row, 1).to_pylist()[0]) for row in rows]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(folder.path.resolve().name),
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
def _explain_damage(folder: ShardFolder, path: Path) -> Iterator[None]:
    """Raise a UserError that names the file `path` if the block fails because this file is missing or damaged."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, Rejected) as error:
        raise UserError(
            f"{path} is missing or damaged ({first_line(error)}); "
            f"`python -m preprocess.shardset verify {folder}` lists all damage and what to do"
        ) from None


def choose_rejects(path: Path, count: int) -> list[Reject]:
    """Choose up to `count` rejects of a file, as evenly as possible from all sources and reasons, in their order."""
    numbers: dict[tuple[str, str], int] = {}
    kinds = [numbers.setdefault((reject.source, reject.reason), len(numbers)) for reject in read_rejects(path)]
    chosen = set(choose_rows(np.asarray(kinds, dtype=np.int32), count))
    return [reject for number, reject in enumerate(read_rejects(path)) if number in chosen]


def choose_rows(groups: np.ndarray, count: int) -> list[int]:
    """Choose up to `count` rows, as evenly as possible from all groups, and evenly spaced within each group.

    Args:
        groups: the group of each row, such as its source.
    """
    rows = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups.tolist())]
    shares = Counter(itertools.islice(_round_robin([len(members) for members in rows]), count))
    chosen = [
        rows[group][np.linspace(0, len(rows[group]) - 1, share).round().astype(int)] for group, share in shares.items()
    ]
    return sorted(int(row) for members in chosen for row in members)


def _round_robin(sizes: list[int]) -> Iterator[int]:
    """Yield group numbers in turn. Each group's number is yielded as many times as the group has members."""
    for turn in range(max(sizes, default=0)):
        yield from (group for group, size in enumerate(sizes) if turn < size)


def _read_sample(folder: ShardFolder, manifest: Manifest, row: dict[str, Any]) -> Sample:
    path = folder.file(manifest.shards[row["shard"]].name)
    with _explain_damage(folder, path), path.open("rb") as tar:
        tokens, meta, image = (
            os.pread(tar.fileno(), row[f"{part}_bytes"], row[f"{part}_offset"]) for part in ("tokens", "meta", "image")
        )
        return from_payloads(row["key"], tokens=tokens, meta=meta, image=image or None)


def _facts(manifest: Manifest) -> str:
    counts = manifest.counts
    facts = {
        "model": manifest.model,
        "template": manifest.template,
        "tokenizer": manifest.tokenizer["name"],
        "samples": f"{counts['samples']:,}",
        "images": f"{counts['pictures']:,}",
        "text-only": f"{counts['text_only']:,}",
        "text tokens": f"{counts['text_tokens']:,}",
        "supervised": f"{counts['supervised_tokens'] / max(1, counts['text_tokens']):.0%}",
        "rejected rows": f"{counts['rejects']:,} of {counts['rows']:,}",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts.items())


def _card(sample: Sample, tokenizer: Tokenizer, image_px: int) -> str:
    image = f'<img loading="lazy" alt="" src="{_data_uri(sample, image_px)}">' if sample.image is not None else ""
    kind = "image" if sample.image is not None else "text"
    caption = f"{sample.source} · row {sample.row} · id {sample.id} · key {sample.key}"
    return (
        f'<article data-source="{html.escape(sample.source)}" data-kind="{kind}">{image}'
        f'<div class="text"><p class="turns">{_text_html(sample, tokenizer)}</p>'
        f'<p class="from">{html.escape(caption)}<br>{html.escape(sample.image_path or "no image")} · '
        f"{len(sample.tokens)} tokens, {sample.num_supervised_tokens} supervised</p></div></article>"
    )


def _data_uri(sample: Sample, image_px: int) -> str:
    jpeg = encode_jpeg(sample_pixels(sample, image_px))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _text_html(sample: Sample, tokenizer: Tokenizer) -> str:
    """Return the text of the tokens as HTML, with the supervised spans marked."""
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
