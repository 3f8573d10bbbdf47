"""The visualization page: a self-contained HTML file with the maps of one or more models."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template

from PIL import Image

from pipeline.figures.image_maps import ImageMaps, Magnitudes, Pixels
from pipeline.figures.maps import heat_map, highlight
from preprocess.atomic import publish

PAGE = Path(__file__).with_name("page.html")


def write_page(models: Sequence[ImageMaps], path: Path, *, image_name: str, question: str | None) -> None:
    """Write the page. All images are embedded, so the file can be moved and needs no network access."""
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        image_name=html.escape(image_name),
        image=_embed(models[0].image),
        question=f"<p class=question>{html.escape(question)}</p>" if question else "",
        models="".join(map(_section, models)),
    )
    publish(path, page.encode("utf-8", errors="replace"))


def _section(maps: ImageMaps) -> str:
    answer = f"<p class=answer>{html.escape(maps.answer)}</p>" if maps.answer else ""
    depths = "".join(_depth(name, maps.image, magnitudes) for name, magnitudes in maps.depths.items())
    stages = ""
    if maps.redrawn:
        figures = _figure(maps.image, "original", "") + "".join(
            _figure(redrawn.pixels, redrawn.stage, f"error {redrawn.error:.3f}") for redrawn in maps.redrawn
        )
        stages = f"<h3>The image that the decoder redraws</h3><div class=row>{figures}</div>"
    return (
        f"<section><h2>{html.escape(maps.title)}</h2>{answer}"
        f"<h3>Magnitude of the visual states</h3><div class=row>{depths}</div>{stages}</section>"
    )


def _depth(name: str, image: Pixels, magnitudes: Magnitudes) -> str:
    numbers = f"mean {magnitudes.mean():.3g}, spread {magnitudes.std() / magnitudes.mean():.2f}"
    maps = f'<img class=pixelated src="{_embed(heat_map(magnitudes))}" alt="magnitude, {name}">'
    over = f'<img src="{_embed(highlight(image, magnitudes))}" alt="image highlighted by magnitude, {name}">'
    return f"<figure>{maps}{over}<figcaption><b>{name}</b><br>{numbers}</figcaption></figure>"


def _figure(pixels: Pixels, name: str, note: str) -> str:
    image = f'<img src="{_embed(pixels)}" alt="{name}">'
    return f"<figure>{image}<figcaption><b>{name}</b><br>{note}</figcaption></figure>"


def _embed(pixels: Pixels) -> str:
    """Return the image as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
