# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The max-error picture: where two pictures differ, and where they differ most."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .base import PairedMetric, check_pair

STRIP = 16  # pixels under the picture, for the words


class MaxError(PairedMetric):
    """The largest difference of any channel of any pixel, of 255 levels; 0 is identical.

    Of many pictures it is that of the worst one, no mean. :func:`max_error_picture` shows where.
    """

    name = "max_error"
    label = "max error"
    higher_is_better = False

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        return float((reference.int() - candidate.int()).abs().max())

    def mean(self, values: Tensor) -> float:
        super().mean(values)  # for its checks
        return float(values.max())

    def text(self, value: float) -> str:
        return f"{value:.0f} of 255"


def max_error_picture(
    reference: Tensor, candidate: Tensor, scale: int | None = None
) -> tuple[Image.Image, dict[str, int]]:
    """The largest difference of the channels at each pixel, amplified, the worst place marked.

    Args:
        reference, candidate: (1, 3, H, W) or (3, H, W) uint8.
        scale: difference, in levels of 255, that is shown as white. Default: the largest that
            there is, so that any difference shows; give one to compare several pictures.

    Returns:
        The picture, (H + a strip with the numbers) x W, gray, the worst pixel in a red ring; and
        ``max_error`` (levels of 255), ``x``, ``y`` (pixels from the top left; the first in
        reading order among equals) and ``scale``.

    Raises:
        ToMeError: other shapes or types; more than one picture.
    """
    if reference.ndim == 3:
        reference, candidate = reference[None], candidate[None]
    check_pair(reference[:1], candidate[:1])
    difference = (reference[0].int() - candidate[0].int()).abs().amax(0).cpu()
    worst = int(difference.max())
    y, x = divmod(int(difference.flatten().argmax()), difference.shape[1])
    scale = max(1, worst if scale is None else scale)
    gray = (difference.float() / scale).clamp(0, 1).mul(255).round().byte().numpy()

    height, width = gray.shape
    picture = Image.new("RGB", (width, height + STRIP), "white")
    picture.paste(Image.fromarray(np.repeat(gray[..., None], 3, axis=2)), (0, 0))
    draw = ImageDraw.Draw(picture)
    if worst:
        radius = max(3, min(height, width) // 32)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline="red")
        # What the ring's lower part may have drawn over.
        draw.rectangle((0, height, width, height + STRIP), fill="white")
    texts = [f"max error {worst} of 255 at ({x}, {y})", f"{worst} at ({x}, {y})", str(worst)]
    fitting = [text for text in texts if draw.textlength(text) <= width - 4]
    draw.text((2, height + 2), (fitting or [""])[0] if worst else "identical", fill="black")
    return picture, {"max_error": worst, "x": x, "y": y, "scale": scale}
