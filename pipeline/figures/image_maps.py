"""Content of the figures of visual states. This module does not import matplotlib, which training does not need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Magnitudes = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """An image that the decoder predicts from the fused states of a stage.

    Attributes:
        stage: Name of the stage.
        pixels: The image [h, w, 3], drawn with the mean and the contrast of the original's patches.
        error: Mean squared error of the predicted values, which is close to 1 if nothing is predicted.
    """

    stage: str
    pixels: Pixels
    error: float


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """Visual states of one model for one image.

    Attributes:
        title: Name of the model or of the image.
        image: The part of the image that the vision towers see [h, w, 3].
        depths: Magnitudes of the states on the grid of patches [rows, columns], by the name of the depth.
        redrawn: The redrawn image of each fusion stage. Empty without a decoder of pixels.
        answer: The model's answer to a question about the image, or "".
    """

    title: str
    image: Pixels
    depths: dict[str, Magnitudes]
    redrawn: tuple[Redrawn, ...] = ()
    answer: str = ""
