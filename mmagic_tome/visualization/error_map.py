# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where a merged picture differs from the dense one: heat over the picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..apis.pictures import FULL_SCALE
from ..errors import ToMeError


def pixel_error(dense: Image.Image, merged: Image.Image) -> np.ndarray:
    """(H, W) float64: absolute difference in levels of 255, the mean over RGB.

    Raises:
        ToMeError: the pictures have different sizes.
    """
    if dense.size != merged.size:
        raise ToMeError(f"pictures of {dense.size} and {merged.size} cannot be compared")
    a, b = (np.asarray(image.convert("RGB"), np.float64) for image in (dense, merged))
    return np.abs(a - b).mean(axis=2)


def error_map(
    dense: Image.Image, merged: Image.Image, full_scale: float = FULL_SCALE
) -> Image.Image:
    """The dense picture in grey, with heat where the merged one differs.

    Args:
        dense, merged: PIL images of one size.
        full_scale: difference, of 255 levels, that gets the brightest colour and hides the grey.

    Returns:
        PIL image in RGB; where the pictures agree it is plain grey.
    """
    from matplotlib import colormaps

    heat = np.clip(pixel_error(dense, merged) / full_scale, 0, 1)
    grey = np.asarray(dense.convert("L"), np.float64)[..., None].repeat(3, axis=2)
    # Pale grey, on which the dark end of the colours is seen as well.
    grey = 110 + grey * (145 / 255)
    colour = colormaps["inferno"](0.25 + 0.7 * heat)[..., :3] * 255
    weight = np.sqrt(heat)[..., None]
    return Image.fromarray((grey * (1 - weight) + colour * weight).round().astype(np.uint8))
