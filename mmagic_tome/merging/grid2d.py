# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Destinations on a two-dimensional token grid, one per cell.

Source: "Token Merging for Fast Stable Diffusion" (Bolya and Hoffman, CVPRW
2023, arXiv 2303.17604), section 4: partitioning tokens by cells of sy x sx,
with one random destination in each, keeps destinations spread over the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .random import hashed_integers


@dataclass(frozen=True)
class GridLayout:
    """Partitions of the tokens of a grid into destinations and sources.

    Only the position of the destination inside its cell is stored, as a rule in a byte per cell;
    indices are computed on request. Layouts drawn ahead for later blocks take next to no memory.

    Attributes:
        offset (Tensor): (L, cells) integer position of the destination inside every cell, in
            raster order; L layouts.
        height, width (int): the grid in tokens, N = height * width.
        sx, sy (int): cell width and height in tokens.
    """

    offset: Tensor
    height: int
    width: int
    sx: int
    sy: int

    @property
    def destinations(self) -> Tensor:
        """(L, D) int64 token indices of all layouts."""
        return self._indices(self.offset)[0]

    @property
    def sources(self) -> Tensor:
        """(L, S) int64 token indices of all layouts; D + S = N."""
        return self._indices(self.offset)[1]

    def select(self, index: int) -> tuple[Tensor, Tensor]:
        """(D,) destinations and (S,) sources of one of the layouts, int64."""
        return self._indices(self.offset[index])

    def _indices(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """From (..., cells) offsets to (..., D) destinations and (..., S) sources.

        All shapes are known beforehand: instead of sorting a mask, the sources of a
        cell are enumerated as the positions 0 .. k-1 without the destination's.
        """
        height, width, sx, sy = self.height, self.width, self.sx, self.sy
        device, offset = offset.device, offset.to(torch.int64)
        rows, columns = height // sy, width // sx
        cell = torch.arange(rows * columns, device=device)
        corner = (cell // columns) * (sy * width) + (cell % columns) * sx
        destinations = corner + _inside(offset, width, sx)
        position = torch.arange(sx * sy - 1, device=device)
        position = position + (position >= offset[..., None]).to(torch.int64)
        sources = (corner[:, None] + _inside(position, width, sx)).flatten(-2)
        if rows * sy < height or columns * sx < width:
            token = torch.arange(height * width, device=device).view(height, width)
            right = token[: rows * sy, columns * sx :].reshape(-1)
            bottom = token[rows * sy :].reshape(-1)
            left_over = torch.cat([right, bottom]).expand(*offset.shape[:-1], -1)
            sources = torch.cat([sources, left_over], dim=-1)
        return destinations, sources


def regular_layout(
    height: int, width: int, sx: int = 2, sy: int = 2, device: torch.device | str = "cpu"
) -> GridLayout:
    """One layout: the top-left token of every complete sy x sx cell is its destination.

    Args:
        height, width (int): the grid in tokens; token i is at (i // width, i % width).
        sx, sy (int): cell width and height in tokens, default 2.
        device: of the indices.

    Returns:
        GridLayout: L = 1, D = (height // sy) * (width // sx). Tokens of
        incomplete cells at the right and bottom edge are sources.
    """
    cells = (height // sy) * (width // sx)
    offset = torch.zeros(1, cells, dtype=torch.int64, device=device)
    return grid_layout(offset, height, width, sx, sy)


def random_layout(
    height: int,
    width: int,
    sx: int = 2,
    sy: int = 2,
    *,
    seed: int = 0,
    step: Tensor | None = None,
    count: int = 1,
    device: torch.device | str = "cpu",
) -> GridLayout:
    """``count`` independent layouts with a random destination in every complete cell.

    One vectorised computation draws them all, so that a UNet forward draws the layouts of all its
    blocks of one grid at once. The same arguments always return the same layouts; no generator is
    read.

    Args:
        height, width, sx, sy, device: as in :func:`regular_layout`.
        seed (int): non-negative, default 0.
        step (Tensor | None): key of the denoising step, see :func:`.random.step_key`.
        count (int): L, number of layouts, default 1.

    Returns:
        GridLayout: L = ``count``.
    """
    cells = (height // sy) * (width // sx)
    offset = hashed_integers(sx * sy, seed, step, count, cells, torch.device(device))
    return grid_layout(offset, height, width, sx, sy)


def grid_layout(offset: Tensor, height: int, width: int, sx: int, sy: int) -> GridLayout:
    """Layouts from the (L, cells) position of the destination inside every cell."""
    kind = torch.uint8 if sx * sy <= 256 else torch.int32
    return GridLayout(offset.to(kind), height, width, sx, sy)


def _inside(position: Tensor, width: int, sx: int) -> Tensor:
    """Distance in tokens from a cell's corner to its ``position``-th token in raster order."""
    return (position // sx) * width + position % sx
