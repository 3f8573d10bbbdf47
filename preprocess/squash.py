"""A picture becomes a square as Pillow's antialiased bicubic filter makes it, in less time.

torch filters in integers, too, with coarser weights: a few values are off by a level, which docs/performance.md counts.
Its bytes are the same with any instruction set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


def squash(pixels: Pixels, image_px: int) -> Pixels:
    """[h, w, 3] -> [image_px, image_px, 3]; the aspect ratio is not kept."""
    import torch  # here: half a gigabyte that only those who make pictures need
    from torch.nn.functional import interpolate

    height, width, _ = pixels.shape
    if height == width == image_px:
        return pixels
    picture = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)  # [1, 3, h, w]
    if _columns_first(height, width, image_px):
        picture = interpolate(picture, (image_px, width), mode="bicubic", antialias=True)
    picture = interpolate(picture, (image_px, image_px), mode="bicubic", antialias=True)
    return picture[0].permute(1, 2, 0).contiguous().numpy()


def _columns_first(height: int, width: int, image_px: int) -> bool:
    """Whether Pillow 13 filters columns before rows. Levels are rounded and clipped in between, so the order shows."""
    return height > image_px and height - image_px > 2 * (width - image_px)
