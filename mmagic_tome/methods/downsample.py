# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: every square of tokens becomes one, independent of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merging import IndexPlan, MergePlan, Plan, PrunedPlan
from ..validate import check_choice, check_integer
from .base import Method, PlanRequest, register_method


def squares_plan(
    kind: type[IndexPlan], metric: Tensor, factor: int, request: PlanRequest
) -> IndexPlan | None:
    """Plan of all squares of ``factor`` x ``factor`` tokens, smaller at the grid's far edges.

    Every square is represented by its top-left token. None for a grid of one token.
    """
    height, width = request.height, request.width
    if height * width == 1:
        return None
    token = torch.arange(height * width, device=metric.device)
    row, column = token // width, token % width
    slot = (row // factor) * -(-width // factor) + column // factor
    kept = token.view(height, width)[::factor, ::factor].reshape(-1)
    return kind(slot.expand(metric.shape[0], -1), kept.shape[0], kept)


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
    """

    def __init__(self, factor: Any = 2, mode: Any = "area") -> None:
        self.factor = check_integer(self.where, "factor", factor, 2, 16)
        self.mode = check_choice(self.where, "mode", mode, ("area", "nearest"))

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> Plan | None:
        kind = MergePlan if self.mode == "area" else PrunedPlan
        return squares_plan(kind, metric, self.factor, request) if ratio > 0 else None
