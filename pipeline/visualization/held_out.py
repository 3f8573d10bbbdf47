"""Drawings during training: what the model still sees of a few held-out images at each depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.alignment import align_target
from model.emma import Emma
from model.errors import UserError
from model.presets import paper_taps
from model.vision import Towers
from pipeline.data.batch import MicroBatch, collate
from pipeline.data.loader import TrainData
from pipeline.engine import Engine
from pipeline.errors import convert_oserrors
from pipeline.figures.image_maps import ImageMaps
from pipeline.recipe import Recipe
from pipeline.step import forward
from pipeline.visualization.states import forward_hooks, magnitudes, redraw, redraws_pixels, seen_part

FOLDER = "images"  # in the run folder


class HeldOutImages:
    """Draw the first `evaluate.draw_images` held-out images, the same ones each time.

    Drawing does not change the weights, so a run that draws computes the same bits as a run that does not.

    Raises: UserError if the held-out shards have no images.
    """

    def __init__(self, recipe: Recipe, data: TrainData):
        self.recipe, self.config = recipe, recipe.config
        alignment = self.config.alignment
        self.tap = alignment.tap if alignment else "mixer"
        self.layers = (alignment and alignment.taps) or paper_taps(self.config.llm.num_layers)
        self.batch = _first_images(data, recipe.evaluate.draw_images)

    def due(self, step: int) -> bool:
        """Return whether the recipe asks for a drawing after this step."""
        return step % self.recipe.evaluate.draw_every_steps == 0

    @torch.no_grad()
    def maps(self, engine: Engine, towers: Towers) -> list[ImageMaps]:
        """Return the maps of each image. Must be called on every rank, because each rank has a part of the weights."""
        batch, vision = self.batch.to(engine.device), self.config.vision
        assert batch.pixels is not None
        states: dict[str, Tensor] = {}
        predicted: list[Tensor] = []
        with forward_hooks(self._hooks(engine.module, states, predicted)):
            engine.eval()
            forward(engine, towers, self.config, batch)
            engine.train()
        depths = {name: magnitudes(vision, state[:, : vision.num_patches]) for name, state in states.items()}
        redrawn = []
        if predicted:
            target = align_target(self.config, towers, batch.pixels, towers(batch.pixels))
            redrawn = redraw(vision, "redrawn", predicted[0], target)
        return [
            ImageMaps(
                title=f"held-out image {i + 1}",
                image=seen_part(vision, pixels),
                depths={name: maps[i] for name, maps in depths.items()},
                redrawn=tuple(redrawn[i : i + 1]),
            )
            for i, pixels in enumerate(batch.pixels.permute(0, 2, 3, 1).cpu().numpy())
        ]

    def _hooks(
        self, emma: Emma, states: dict[str, Tensor], predicted: list[Tensor]
    ) -> dict[nn.Module, Callable[..., None]]:
        """Return hooks that keep the state of each layer, the final state, and the decoder's prediction."""

        def keep_layer(layer: int, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            hidden, residual = output
            states[f"layer {layer}"] = hidden if self.tap == "mixer" else hidden + residual

        def keep_final(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            states["final"] = output[0]

        hooks: dict[nn.Module, Callable[..., None]] = {
            emma.llm.backbone.layers[layer]: partial(keep_layer, layer) for layer in self.layers
        }
        hooks[emma.llm] = keep_final
        if emma.alignment is not None and redraws_pixels(self.config):
            hooks[emma.alignment.out] = lambda module, inputs, output: predicted.append(output)
        return hooks

    def write(self, maps: list[ImageMaps], step: int) -> Path:
        """Draw the maps into the run folder and return the path of the PNG. Main rank only."""
        from pipeline.figures.maps import draw_images  # imports matplotlib, which takes a second

        path = Path(self.recipe.run.dir) / FOLDER / f"step-{step:08d}.png"
        with convert_oserrors(path):
            path.parent.mkdir(exist_ok=True)
            draw_images(maps, path, title=f"{self.config.name} after step {step}")
        return path


def _first_images(data: TrainData, count: int) -> MicroBatch:
    """Return the first rows of a shard set that have different images."""
    rows: dict[str, Any] = {}
    for row in np.flatnonzero(data.plan.has_image):
        if len(rows) == count:
            break
        sample, pixels = data.reader.read(int(row))
        rows.setdefault(str(sample.image_path), (sample, pixels))
    if not rows:
        raise UserError(
            f"evaluate.shards: {data.reader.folder} has no images; give held-out shards with images, or leave "
            "evaluate.draw_every_steps out"
        )
    return collate(list(rows.values()), np.ones(len(rows), dtype=np.bool_))
