# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens became one, painted over a picture.

As in "Token Merging: Your ViT But Faster" (arXiv 2210.09461, figure 4): tokens that share a slot
are painted in their common mean colour, and an edge runs between tokens of different slots.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import ToMeError

# Pixels per token at least, or edges would hide what they divide.
_TOKEN = 6
# Of 255 levels: what is brighter gets lines of this grey instead of white ones.
_BRIGHT, _GREY = 190, 150.0


def merge_map(
    slot: np.ndarray,
    grid: tuple[int, int],
    picture: Image.Image,
    edge: tuple[int, int, int] | str | None = "auto",
) -> Image.Image:
    """Paint groups of merged tokens over a picture.

    A token that shares its slot with no other shows the picture as it is.

    Args:
        slot: (N,) slot of every token in rows of the grid, as in ``MergePlan.slot[b]``; a torch
            tensor does as well.
        grid: (height, width) in tokens, N = height * width.
        picture: PIL image that the grid lies over.
        edge: RGB of the lines around groups; ``'auto'`` is white on dark and grey on bright
            colours, None draws no lines.

    Returns:
        PIL image in RGB: the picture, enlarged by a whole factor until a token has 6 pixels.

    Raises:
        ToMeError: slots and grid do not fit, or the picture is smaller than the grid.
    """
    slot = np.asarray(slot)
    height, width = grid
    if slot.shape != (height * width,):
        raise ToMeError(f"{slot.shape} slots do not fit a grid of {height}x{width} tokens")
    if picture.height < height or picture.width < width:
        raise ToMeError(
            f"a picture of {picture.height}x{picture.width} is smaller than its grid of "
            f"{height}x{width} tokens"
        )
    factor = max(1, -(-_TOKEN * width // picture.width), -(-_TOKEN * height // picture.height))
    size = (picture.width * factor, picture.height * factor)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), np.float64)
    labels = group_labels(slot, grid, pixels.shape[:2])
    painted = _in_mean_colours(pixels, labels, slot)
    if edge is not None:
        shared = np.bincount(slot)[slot].reshape(grid) > 1
        merged = _enlarge(shared, pixels.shape[:2])
        line = _edges(labels, merged)
        if edge == "auto":
            bright = painted.mean(axis=2, keepdims=True) > _BRIGHT
            edge = np.where(bright, _GREY, 255.0)[line]
        painted[line] = edge
    return Image.fromarray(painted.round().astype(np.uint8))


def group_labels(slot: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) slot of every pixel of a picture of ``size`` (height, width)."""
    return _enlarge(np.asarray(slot).reshape(grid), size)


def _enlarge(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) values of tokens as (H, W) values of pixels, the nearest token's."""
    rows = np.arange(size[0]) * tokens.shape[0] // size[0]
    columns = np.arange(size[1]) * tokens.shape[1] // size[1]
    return tokens[rows[:, None], columns]


def _in_mean_colours(pixels: np.ndarray, labels: np.ndarray, slot: np.ndarray) -> np.ndarray:
    sizes = np.bincount(slot)
    flat = labels.reshape(-1)
    count = np.bincount(flat, minlength=len(sizes)).clip(1)
    means = np.stack(
        [
            np.bincount(flat, pixels[..., channel].reshape(-1), len(sizes)) / count
            for channel in range(3)
        ],
        axis=1,
    )
    alone = (sizes == 1)[labels][..., None]
    return np.where(alone, pixels, means[labels])


def _edges(labels: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels left of or above another group, if one of the two is merged."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & (merged[:, :-1] | merged[:, 1:])
    edge[:-1] |= (labels[:-1] != labels[1:]) & (merged[:-1] | merged[1:])
    return edge
