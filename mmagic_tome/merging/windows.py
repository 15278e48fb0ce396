# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Local windows of a token grid, all of one size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of n tokens each, and the tokens outside of all windows.

    Attributes:
        inside (Tensor): (W, n) int64 token indices, row by row in every window.
        outside (Tensor): (L,) int64 token indices; W * n + L = N.
    """

    inside: Tensor
    outside: Tensor

    @property
    def count(self) -> int:
        """W."""
        return self.inside.shape[0]

    @property
    def size(self) -> int:
        """n."""
        return self.inside.shape[1]


def window_side(length: int, window: int) -> int:
    """The side in (window / 2, window] that leaves the fewest tokens outside of all windows.

    Args:
        length (int): of the grid in one direction, at least 1.
        window (int): largest side, at least 1.

    Returns:
        int: ``length`` if that is at most ``window``; the larger side in case of a tie.
    """
    if length <= window:
        return length
    return min(range(window, window // 2, -1), key=lambda side: length % side)


def make_windows(height: int, width: int, window: int, device: torch.device) -> Windows:
    """Windows of about ``window`` x ``window`` tokens from the top left of a grid.

    Sides are those of :func:`window_side`: a grid that is no multiple of ``window`` gets slightly
    smaller windows rather than a wide margin outside of all of them.

    Args:
        height, width (int): the grid in tokens.
        window (int): largest side.
        device (torch.device): of the indices.
    """
    sy, sx = window_side(height, window), window_side(width, window)
    rows, columns = height // sy, width // sx
    token = torch.arange(height * width, device=device).view(height, width)
    whole = token[: rows * sy, : columns * sx]
    inside = whole.reshape(rows, sy, columns, sx).transpose(1, 2).reshape(-1, sy * sx)
    right = token[: rows * sy, columns * sx :].reshape(-1)
    bottom = token[rows * sy :].reshape(-1)
    return Windows(inside, torch.cat([right, bottom]))
