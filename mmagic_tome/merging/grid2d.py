# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Cells of a two-dimensional token grid, with a destination each.

Source: "Token Merging for Fast Stable Diffusion" (Bolya and Hoffman, CVPRW 2023, arXiv
2303.17604), section 4: partitioning tokens by cells of sy x sx, with one random destination in
each, keeps destinations spread over the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .random import hashed_integers


@dataclass(frozen=True)
class GridLayout:
    """Partitions of the tokens of a grid into destinations and sources.

    Only the position of the destination inside its cell is stored, as a rule in a byte per cell, so
    layouts drawn ahead for later blocks take next to no memory.

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

    def select(self, index: int | slice) -> tuple[Tensor, Tensor]:
        """(D,) destinations and (S,) sources of one of the layouts, int64, D + S = N; for a slice
        (L, D) and (L, S)."""
        offset = self.offset[index]
        cells = tile_grid(self.height, self.width, self.sy, self.sx, offset.device)
        cell = torch.arange(cells.count, device=offset.device)
        # No mask, whose size is not known beforehand: positions without the destination's.
        position = torch.arange(cells.size - 1, device=offset.device)
        position = position + (position >= offset[..., None]).to(torch.int64)
        destinations = cells.inside[cell, offset.to(torch.int64)]
        sources = cells.inside[cell[:, None], position].flatten(-2)
        if cells.outside.shape[0]:
            outside = cells.outside.expand(*offset.shape[:-1], -1)
            sources = torch.cat([sources, outside], dim=-1)
        return destinations, sources


def regular_layout(
    height: int, width: int, sx: int = 2, sy: int = 2, device: torch.device | str = "cpu"
) -> GridLayout:
    """One layout: the top-left token of every complete sy x sx cell is its destination.

    Args:
        height, width (int): the grid in tokens; token i is at (i // width, i % width).
        sx, sy (int): cell width and height in tokens, default 2. Tokens of incomplete cells at
            the right and bottom edge are sources.
        device: of the indices.
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
    """``count`` independent layouts with a random destination in every complete cell, the same for
    the same arguments; ``step`` is of :func:`.random.step_key`."""
    cells = (height // sy) * (width // sx)
    offset = hashed_integers(sx * sy, seed, step, count, cells, torch.device(device))
    return grid_layout(offset, height, width, sx, sy)


def grid_layout(offset: Tensor, height: int, width: int, sx: int, sy: int) -> GridLayout:
    """Layouts from the (L, cells) position of the destination inside every cell."""
    kind = torch.uint8 if sx * sy <= 256 else torch.int32
    return GridLayout(offset.to(kind), height, width, sx, sy)


@dataclass(frozen=True)
class Cells:
    """Cells of n tokens each, and the tokens outside of all cells."""

    inside: Tensor  # (cells, n) int64 token indices, row by row in every cell
    outside: Tensor  # (L,) int64 token indices; cells * n + L = N

    @property
    def count(self) -> int:
        """Number of cells."""
        return self.inside.shape[0]

    @property
    def size(self) -> int:
        """n."""
        return self.inside.shape[1]


def tile_grid(height: int, width: int, sy: int, sx: int, device: torch.device) -> Cells:
    """All complete cells of sy x sx tokens from the top left of a grid, row by row.

    Outside of them are the incomplete ones at its right edge, then those at the bottom.
    """
    rows, columns = height // sy, width // sx
    token = torch.arange(height * width, device=device).view(height, width)
    inside = token[: rows * sy, : columns * sx].reshape(rows, sy, columns, sx).transpose(1, 2)
    right, bottom = token[: rows * sy, columns * sx :], token[rows * sy :]
    outside = torch.cat([right.reshape(-1), bottom.reshape(-1)])
    return Cells(inside.reshape(rows * columns, sy * sx), outside)
