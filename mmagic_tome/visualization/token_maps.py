# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which tokens of a vision transformer became one: on a picture, over a clip's frames, in sound.

After "Token Merging: Your ViT But Faster" (arXiv 2210.09461, its figures of images and video):
patches that share a token are painted in their common mean colour with an edge around them; in a
clip the mean is over all frames, so what keeps its colour is one token.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import ToMeError
from .merge_map import _edges, _in_mean_colours, group_labels, merge_map

# Colours of groups that are followed: tell-apart hues.
_HUES = np.array(
    [(230, 25, 75), (60, 180, 75), (255, 200, 0), (0, 130, 200), (245, 130, 48), (200, 60, 220)]
)


def picture_map(source: np.ndarray, grid: tuple[int, int], picture: Image.Image) -> Image.Image:
    """Groups painted over a picture.

    Args:
        source: (h * w,) the token that holds each patch, in rows; without class tokens.
        grid: (h, w) in patches.
        picture: PIL image that the grid lies over.
    """
    return merge_map(source, grid, picture)


def clip_maps(
    source: np.ndarray, grid: tuple[int, int, int], frames: list[Image.Image]
) -> list[Image.Image]:
    """Groups painted over the frames of a clip, in their mean colour over all frames.

    Args:
        source: (t * h * w,) the token that holds each patch, frame by frame.
        grid: (t, h, w) in tokens; every token holds ``len(frames) / t`` frames.
        frames: PIL images of one size.

    Returns:
        list: a picture per frame.

    Raises:
        ToMeError: tokens, grid and frames do not fit.
    """
    labels, pixels = _clip(source, grid, frames)
    # One tall picture: a group's mean is over all frames.
    tall = _in_mean_colours(
        pixels.reshape(-1, *pixels.shape[2:]), labels.reshape(-1, labels.shape[2]), source
    )
    painted = tall.reshape(pixels.shape)
    alone = (np.bincount(source) == 1)[labels]
    for frame, label, single in zip(painted, labels, alone):
        frame[_edges(label, ~single)] = 255
    return [Image.fromarray(frame.round().astype(np.uint8)) for frame in painted]


def followed(source: np.ndarray, grid: tuple[int, int, int], count: int = 6) -> list[int]:
    """The groups worth following: in the most frames, and of those the smallest.

    Args: as :func:`clip_maps`.

    Returns:
        list: at most ``count`` tokens, each in at least two places in time.
    """
    slots = source.reshape(grid[0], -1)
    present = np.zeros((source.max() + 1, grid[0]), bool)
    for time, row in enumerate(slots):
        present[row, time] = True
    lasting, size = present.sum(1), np.bincount(source)
    order = np.lexsort((size, -lasting))
    return [int(slot) for slot in order[:count] if lasting[slot] > 1]


def followed_maps(
    source: np.ndarray,
    grid: tuple[int, int, int],
    frames: list[Image.Image],
    groups: list[int],
) -> list[Image.Image]:
    """A few groups, each in a colour of its own, over the darkened frames.

    Args: as :func:`clip_maps`; ``groups`` of :func:`followed`.
    """
    labels, pixels = _clip(source, grid, frames)
    painted = 0.45 * pixels
    for number, slot in enumerate(groups):
        here = labels == slot
        hue = _HUES[number % len(_HUES)]
        painted[here] = 0.55 * pixels[here] + 0.45 * hue
        for frame, mask in zip(painted, here):
            frame[_border(mask)] = hue
    return [Image.fromarray(frame.clip(0, 255).round().astype(np.uint8)) for frame in painted]


def spectrogram_map(
    source: np.ndarray | None, spectrogram: np.ndarray, scale: int = 3
) -> Image.Image:
    """A spectrogram whose merged tokens show their mean spectrum, with a strip of groups below.

    Args:
        source: (N,) the token that holds each stretch of time; None: nothing is merged.
        spectrogram: (bands, frames), low bands first, ``frames`` a multiple of N.
        scale: pixels per token. Default 3.

    Returns:
        PIL image, high bands on top. Below, a strip: every group has a colour of its own, tokens
        that are alone are white.

    Raises:
        ToMeError: tokens and frames do not fit.
    """
    from matplotlib import colormaps

    bands, frames = spectrogram.shape
    tokens = frames // 2 if source is None else len(source)
    if tokens == 0 or frames % tokens:
        raise ToMeError(f"{tokens} tokens do not fit a spectrogram of {frames} frames")
    columns = spectrogram.reshape(bands, tokens, -1).mean(2)
    strip = np.full((tokens, 3), 255.0)
    if source is not None:
        size = np.bincount(source)
        means = np.stack([np.bincount(source, band) / size.clip(1) for band in columns])
        columns = means[:, source]
        # A step of the golden ratio around the circle: groups that are near differ.
        hues = colormaps["hsv"]((source * 0.6180339887) % 1)[:, :3] * 255
        strip = np.where((size[source] > 1)[:, None], hues, strip)
    low, high = spectrogram.min(), spectrogram.max()
    shade = (columns - low) / max(high - low, 1e-9)
    picture = colormaps["magma"](shade[::-1])[..., :3] * 255
    picture = picture.repeat(2, axis=0).repeat(scale, axis=1)
    if source is not None:
        edge = np.flatnonzero(source[1:] != source[:-1])
        merged = size[source] > 1
        edge = edge[merged[edge] | merged[edge + 1]]
        picture[:4, (edge + 1) * scale - 1] = 255
    strip = strip[None].repeat(12, axis=0).repeat(scale, axis=1)
    return Image.fromarray(np.concatenate([picture, strip]).round().astype(np.uint8))


def _clip(source, grid, frames) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W) labels and (T, H, W, 3) pixels."""
    source = np.asarray(source)
    times, height, width = grid
    if source.shape != (times * height * width,):
        raise ToMeError(f"{source.shape} tokens do not fit a grid of {times}x{height}x{width}")
    if not frames or len(frames) % times:
        raise ToMeError(f"{len(frames)} frames do not fit {times} tokens in time")
    pixels = np.stack([np.asarray(frame.convert("RGB"), np.float64) for frame in frames])
    size = pixels.shape[1:3]
    labels = [group_labels(part, (height, width), size) for part in source.reshape(times, -1)]
    return np.repeat(np.stack(labels), len(frames) // times, axis=0), pixels


def _border(mask: np.ndarray, width: int = 2) -> np.ndarray:
    """Pixels of a mask within ``width`` of its outside."""
    inside = mask.copy()
    for _ in range(width):
        padded = np.pad(inside, 1)
        inside &= padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
