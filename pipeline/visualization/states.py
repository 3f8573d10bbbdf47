"""Visual states of a model: their magnitudes by depth, and the redrawn image of each fusion stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.alignment import Alignment, AlignTarget, align_target, unpatchify
from model.config import EmmaConfig, Tap, VisionConfig
from model.presets import paper_taps
from model.weights import LoadedModel
from pipeline.figures.image_maps import ImageMaps, Magnitudes, Pixels, Redrawn


def default_layers(config: EmmaConfig) -> list[int]:
    """Return the layers to show: those that the fusion taps, otherwise the paper's, with others around them."""
    last = config.llm.num_layers - 1
    taps = (config.alignment and config.alignment.taps) or paper_taps(last + 1)
    return sorted({0, taps[0] // 2, *taps, last})


@torch.inference_mode()
def look_inside(
    model: LoadedModel, pixels: Pixels, layers: Sequence[int], *, tap: Tap, title: str, answer: str = ""
) -> ImageMaps:
    """Return the magnitudes of a model's visual states, and the image that the decoder redraws from them.

    No text is needed, because the image precedes the text and the model is causal.

    Args:
        pixels: The image, uint8 [h, w, 3], at the model's size.
        layers: 0-based layers, in increasing order. The final normed state is always added.
        tap: State of a layer: the output of its mixer, or the residual stream after it.
    """
    config, emma = model.config, model.emma
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device)  # [1, 3, h, w]
    features = model.towers(batch)
    visual = emma.projector(features.to(emma.llm.lm_head.weight.dtype))
    final, states = emma.llm(visual, layers, tap)
    redrawn: list[Redrawn] = []
    if emma.alignment is not None and config.alignment is not None and redraws_pixels(config):
        levels = (*emma.llm(visual, config.alignment.taps, config.alignment.tap)[1], final)
        target = align_target(config, model.towers, batch, features)
        nothing = {"patch means only": torch.zeros_like(target.values)}
        for stage, values in (nothing | _predict_by_stage(emma.alignment, config, levels)).items():
            redrawn += redraw(config.vision, stage, values, target)
    depths = {f"layer {layer}": state for layer, state in zip(layers, states, strict=True)}
    return ImageMaps(
        title=title,
        image=seen_part(config.vision, pixels),
        depths={name: magnitudes(config.vision, state)[0] for name, state in (depths | {"final": final}).items()},
        redrawn=tuple(redrawn),
        answer=answer,
    )


def redraws_pixels(config: EmmaConfig) -> bool:
    """Return whether the decoder predicts pixels, so that an image can be drawn from its output."""
    return config.alignment is not None and config.alignment.target == "pixels"


def magnitudes(vision: VisionConfig, states: Tensor) -> list[Magnitudes]:  # [b, n, d] -> b × [rows, columns]
    """Return the Euclidean norm of each patch's state, on the grid of patches."""
    return list(states.float().norm(dim=-1).unflatten(1, (vision.grid, vision.grid)).cpu().numpy())


def seen_part(vision: VisionConfig, pixels: Pixels) -> Pixels:  # [h, w, 3] -> [seen_px, seen_px, 3]
    return pixels[: vision.seen_px, : vision.seen_px]


def redraw(vision: VisionConfig, stage: str, values: Tensor, target: AlignTarget) -> list[Redrawn]:
    """Draw predicted values as images, and compute their errors.

    The decoder predicts values that are normalised per patch, so the mean and the contrast of each patch are the
    original's.

    Args:
        values: Predicted values of each patch [b, n, values].
    """
    errors = (values.float() - target.values).square().mean((1, 2)).tolist()
    images = unpatchify(vision, values, target.mean, target.std).permute(0, 2, 3, 1).cpu().numpy()
    return [Redrawn(stage=stage, pixels=image, error=error) for image, error in zip(images, errors, strict=True)]


def _predict_by_stage(alignment: Alignment, config: EmmaConfig, levels: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the decoder's prediction from the fused state before the first fusion block and after each block.

    The decoder was trained only on the fused state after the last block.
    """
    assert config.alignment is not None
    blocks = list(getattr(alignment.fusion, "blocks", ()))
    if not blocks:
        return {"final state": alignment.predict(levels)}
    fused: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        fused.extend([inputs[0], output] if module is blocks[0] else [output])

    with forward_hooks(dict.fromkeys(blocks, keep)):
        last = alignment.predict(levels)
    predictions = [*(alignment.decode(state) for state in fused[:-1]), last]
    if config.alignment.fusion == "cascade":
        first, *others = config.alignment.taps
        names = [f"layer {first} alone", *(f"+ layer {tap}" for tap in others), "+ final state"]
    else:
        names = ["queries alone", *(f"fusion block {number}" for number in range(1, len(fused)))]
    return dict(zip(names, predictions, strict=True))


@contextmanager
def forward_hooks(hooks: Mapping[nn.Module, Callable[[nn.Module, Any, Any], None]]) -> Iterator[None]:
    """Call a function after each forward pass of a module, with the module, its inputs and its output."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
