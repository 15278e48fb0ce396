# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A plan whose merging and unmerging are matrix products in local windows."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid2d import Windows
from .plan import check_shape


class MatrixPlan:
    """Soft merging: every slot is a weighted mean of all tokens of its window.

    A token belongs to all slots of its window, to each by a fraction. Slots come window by window,
    followed by the unchanged tokens outside of all windows. Both directions are differentiable
    with respect to the tokens.

    Args:
        weights (Tensor): (B * W, D, n) floating, row sums 1: slot d of a window is
            sum_i weights[d, i] x_i.
        back (Tensor): (B * W, n, D) floating, row sums 1: token i becomes sum_d back[i, d] y_d.
        windows (Windows): W windows of n tokens and the tokens outside.
    """

    __slots__ = ("_inverse", "_order", "back", "batch", "num_slots", "num_tokens", "weights")

    def __init__(self, weights: Tensor, back: Tensor, windows: Windows) -> None:
        groups, slots, size = weights.shape
        count, outside = windows.count, windows.outside.shape[0]
        self.weights, self.back = weights, back
        self.batch = groups // count
        self.num_slots = count * slots + outside
        self.num_tokens = count * size + outside
        # Window order and back.
        self._order = torch.cat([windows.inside.reshape(-1), windows.outside])
        self._inverse = torch.empty_like(self._order)
        self._inverse[self._order] = torch.arange(self.num_tokens, device=self._order.device)

    @property
    def slot(self) -> Tensor:
        """(B, N) int64, the slot with the largest weight in every token's unmerging."""
        return self._largest(self.back).index_select(1, self._inverse)

    @property
    def size(self) -> Tensor:
        """(B, M), the dtype of the matrices; fractions of an inverse may be negative."""
        inside = self.back.sum(dim=1).view(self.batch, -1)
        outside = self.num_slots - inside.shape[1]
        return torch.cat([inside, inside.new_ones(self.batch, outside)], dim=1)

    @property
    def representative(self) -> Tensor:
        """(B, M) int64, the token with the largest weight in every slot."""
        return self._order[self._largest(self.weights)]

    def _largest(self, matrix: Tensor) -> Tensor:
        """Column of the largest entry of every row, and tokens outside, in window order."""
        groups, rows, columns = matrix.shape
        count, device = groups // self.batch, matrix.device
        first = torch.arange(groups, device=device) % count * columns
        inside = (matrix.argmax(dim=-1) + first[:, None]).view(self.batch, count * rows)
        outside = self.num_slots - count * self.back.shape[2]
        outside = torch.arange(outside, device=device) + count * columns
        return torch.cat([inside, outside.expand(self.batch, -1)], dim=1)

    def merge(self, x: Tensor) -> Tensor:
        check_shape(x, self.batch, self.num_tokens, "merge")
        return self._product(self.weights, x.index_select(1, self._order))

    def unmerge(self, y: Tensor) -> Tensor:
        check_shape(y, self.batch, self.num_slots, "unmerge")
        return self._product(self.back, y).index_select(1, self._inverse)

    def _product(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Matrix times the tokens in windows; those outside stay."""
        groups, _, columns = matrix.shape
        inside = groups // self.batch * columns
        windows = x[:, :inside].reshape(groups, columns, x.shape[-1])
        # Under autocast a product is returned in half precision.
        out = torch.bmm(matrix.to(x.dtype), windows).to(x.dtype)
        out = out.view(self.batch, -1, x.shape[-1])
        return torch.cat([out, x[:, inside:]], dim=1) if inside < x.shape[1] else out
