# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: every square of tokens becomes one, independent of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merging import MergePlan, Plan, PrunedPlan
from ..validate import check_choice, check_integer
from .base import Method, PlanRequest, register_method

_WHERE = "method 'downsample': "


def squares(height: int, width: int, factor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Squares of ``factor`` x ``factor`` tokens that cover a grid, smaller at its far edges.

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
    """A control, not a published method: measures the benefit of matching similar tokens at all.

    The grid is scaled down by ``factor`` in both directions before a target and up again after it.

    ``ratio`` selects where and when, not how much: above 0 the method is on, at 0 it is off. It
    removes 1 - 1 / factor**2 of the tokens; cells (``sx``, ``sy``) have no effect.

    Args:
        factor (int): in [2, 16]. Default 2.
        mode (str): 'area' (default) averages a square; 'nearest' keeps its top-left token. Both
            unmerge by copying.

    Raises:
        ToMeError: an option out of range.
    """

    def __init__(self, factor: Any = 2, mode: Any = "area") -> None:
        self.factor = check_integer(_WHERE, "factor", factor, 2, 16)
        self.mode = check_choice(_WHERE, "mode", mode, ("area", "nearest"))

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> Plan | None:
        if ratio <= 0 or request.height * request.width == 1:
            return None
        batch = metric.shape[0]
        slot, kept = squares(request.height, request.width, self.factor, metric.device)
        kind = MergePlan if self.mode == "area" else PrunedPlan
        return kind(slot.expand(batch, -1), kept.shape[0], kept)
