# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ToDo: keys and values of every second token, whatever the tokens are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merging import Plan, PrunedPlan
from ..validate import check_integer
from .base import Method, PlanRequest, register_method


@register_method("todo")
class ToDo(Method):
    """Keys and values of self-attention from the grid scaled down by nearest neighbour.

    With D the downsampling (the top-left token of every factor x factor square)::

        attention(Q = q(x), K = k(D(x)), V = v(D(x)))        (B, N, C) -> (B, N, C)

    Neighbours in an image are similar, so no similarities are computed; all queries stay, so
    nothing is unmerged. The cost of attention's products falls from N² to N² / factor²; the
    projections of queries and output stay as they are. Targets other than self-attention, if
    selected, are downsampled in the same way and upsampled by copying.

    ``ratio`` selects where and when, not how much: above 0 it is on, at 0 off. Cells (``sx``,
    ``sy``) have no effect.

    Args:
        downsample_factor (int): on the finest merged level, in [1, 16]. Default 2. Larger
            images tolerate more: 3 at 1536², 4 at 2048² with Stable Diffusion 1.5.
        downsample_factor_level_2 (int): on the coarser levels, in [1, 16]. Default 1: off; 2 at
            2048². These levels need a ``max_downsample`` above the finest level's.

    Source: "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (Smith
    et al., IJCAI 2024, arXiv 2402.13573).
    """

    keeps_queries = True

    def __init__(self, downsample_factor: Any = 2, downsample_factor_level_2: Any = 1) -> None:
        given = dict(
            downsample_factor=downsample_factor, downsample_factor_level_2=downsample_factor_level_2
        )
        self.factors = [check_integer(self.where, *item, 1, 16) for item in given.items()]

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> Plan | None:
        height, width = request.height, request.width
        factor = self.factors[min(request.level, 1)]
        if ratio <= 0 or factor == 1 or height * width == 1:
            return None
        token = torch.arange(height * width, device=metric.device)
        row, column = token // width, token % width
        # Squares are smaller at the grid's far edges.
        slot = (row // factor) * -(-width // factor) + column // factor
        kept = token.view(height, width)[::factor, ::factor].reshape(-1)
        return PrunedPlan(slot.expand(metric.shape[0], -1), kept.shape[0], kept)
