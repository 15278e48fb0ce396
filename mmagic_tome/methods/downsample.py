# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: every square of tokens becomes one, whatever the tokens are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merging import MergePlan
from ..merging.reductions import PrunedPlan
from .base import Method, PlanRequest, register_method
from .options import check_choice, check_integer


def squares(height: int, width: int, factor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Squares of ``factor`` x ``factor`` tokens that cover a grid, cut off at its edges.

    Returns:
        tuple: slot (N,) int64, the square of every token; kept (M,) int64, the top-left token of
        every square, M = ceil(height / factor) * ceil(width / factor).
    """
    token = torch.arange(height * width, device=device)
    row, column = token // width, token % width
    slot = (row // factor) * -(-width // factor) + column // factor
    kept = token.view(height, width)[::factor, ::factor].reshape(-1)
    return slot, kept


@register_method("downsample")
class Downsample(Method):
    """A control, not a published method: what it is worth to look at the tokens at all.

    The grid is scaled down by ``factor`` in both directions before a site and up again after it.
    Squares at the right and bottom edge are smaller where the grid is no multiple of the factor.

    ``ratio`` says where and when, not how much: above 0 it happens, at 0 it does not. What is
    removed is 1 - 1 / factor**2 of the tokens, and cells (``sx``, ``sy``) have no meaning.

    Args:
        factor (int): in [2, 16]. Default 2.
        mode (str): 'area' (default) averages a square; 'nearest' keeps its top-left token. Both
            come back by copying.

    Raises:
        ToMeError: an option out of range.
    """

    def __init__(self, factor: Any = 2, mode: Any = "area") -> None:
        self.factor = check_integer("downsample", "factor", factor, 2, 16)
        self.mode = check_choice("downsample", "mode", mode, ("area", "nearest"))

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> MergePlan | None:
        if ratio <= 0 or request.height * request.width == 1:
            return None
        batch = metric.shape[0]
        slot, kept = squares(request.height, request.width, self.factor, metric.device)
        slot = slot.expand(batch, -1)
        if self.mode == "area":
            return MergePlan(slot, kept.shape[0])
        return PrunedPlan(slot, kept.expand(batch, -1))
