"""Figures of a model's visual states: their magnitude at several depths, and the image that the decoder redraws."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.figures.image_maps import ImageMaps, Magnitudes, Pixels

COLOURS = colormaps["inferno"]
CLIPPED_PERCENT = 1  # share of the patches at each end of the colour scale, so that single outliers do not set it
DARKEST = 0.12  # brightness of the patch with the smallest magnitude in `highlight`
PANEL_INCHES = 1.9
WRAP_COLUMNS = 24  # characters of a line of text in a panel


def heat_map(magnitudes: Magnitudes) -> Pixels:
    """Colour each patch by its magnitude, from dark (small) to bright (large). Return one pixel per patch."""
    return (COLOURS(_scale(magnitudes))[..., :3] * 255).round().astype(np.uint8)


def highlight(image: Pixels, magnitudes: Magnitudes) -> Pixels:
    """Darken each patch of the image, the more the smaller its magnitude is."""
    side = len(image) // len(magnitudes)
    brightness = DARKEST + (1 - DARKEST) * _scale(magnitudes)
    return (image * brightness.repeat(side, 0).repeat(side, 1)[..., None]).round().astype(np.uint8)


def _scale(magnitudes: Magnitudes) -> Magnitudes:
    """Scale to [0, 1]. Each map has its own scale, because magnitudes grow with depth."""
    low, high = np.percentile(magnitudes, (CLIPPED_PERCENT, 100 - CLIPPED_PERCENT))
    return ((magnitudes - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def draw_models(models: Sequence[ImageMaps], path: Path, *, question: str | None = None) -> None:
    """Draw the maps of each model below those of the previous one, with its answer to a question. Writes a PNG."""
    columns = 1 + max(max(len(maps.depths), len(maps.redrawn)) for maps in models)
    rows = [3 if maps.redrawn else 2 for maps in models]
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * 1.16 * sum(rows)), layout="constrained")
    parts = figure.subfigures(len(models), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, maps, num_rows in zip(parts, models, rows, strict=True):
        part.suptitle(maps.title, fontsize=13, fontweight="bold")
        panels = part.subplots(num_rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.axis("off")
        _show(panels[0, 0], maps.image, "image")
        if question:
            panels[1, 0].text(0, 1, _dialogue(question, maps.answer), fontsize=8, va="top")
        for axes, (depth, magnitudes) in zip(panels[:2, 1:].T, maps.depths.items(), strict=False):
            _show(axes[0], heat_map(magnitudes), depth)
            _show(axes[1], highlight(maps.image, magnitudes))
        if maps.redrawn:
            _show(panels[2, 0], maps.image, "original")
            for axes, redrawn in zip(panels[2, 1:], maps.redrawn, strict=False):
                _show(axes, redrawn.pixels, f"{redrawn.stage}\nerror {redrawn.error:.3f}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # an answer may contain any character
        figure.savefig(path, dpi=110)


def _dialogue(question: str, answer: str) -> str:
    """Wrap a question and its answer to the width of a panel. Cut an answer that is longer than the panel."""
    lines = textwrap.wrap(answer, WRAP_COLUMNS, max_lines=9, placeholder=" …")
    return "\n".join([*textwrap.wrap(question, WRAP_COLUMNS, max_lines=4, placeholder=" …"), "", *lines])


def draw_images(images: Sequence[ImageMaps], path: Path, *, title: str) -> None:
    """Draw a row of maps for each image: original, last redrawn image, magnitudes by depth. Writes a PNG."""
    columns = 1 + bool(images[0].redrawn) + len(images[0].depths)
    size = (PANEL_INCHES * columns, PANEL_INCHES * 1.12 * len(images) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for panels, maps in zip(figure.subplots(len(images), columns, squeeze=False), images, strict=True):
        row = [(maps.title, maps.image)]
        row += [(f"redrawn, error {redrawn.error:.3f}", redrawn.pixels) for redrawn in maps.redrawn[-1:]]
        row += [(depth, heat_map(magnitudes)) for depth, magnitudes in maps.depths.items()]
        for axes, (label, pixels) in zip(panels, row, strict=True):
            axes.axis("off")
            _show(axes, pixels, label)
    figure.savefig(path, dpi=90)


def _show(axes: Any, pixels: Pixels, label: str = "") -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(label, fontsize=9)
