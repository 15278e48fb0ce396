# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ToFu: prune where the network is far from linear, merge with MLERP where it is close to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..merging import Plan
from ..validate import check_choice, check_number
from .base import Method, PlanRequest, register_method
from .tome import match_on_grid


@register_method("tofu")
class ToFu(Method):
    """ToMe's matching; early blocks prune, the later ones merge with MLERP.

    The paper's argument: averaging two inputs is harmless where f(average) = average of f, that
    is where a block is close to linear. Early blocks are sensitive to averaged inputs: they keep
    the destination's own features. Later blocks merge; an average is shorter than the tokens
    averaged, so with MLERP: the direction of the average at the largest norm among the merged
    (:class:`~mmagic_tome.merging.MlerpPlan`).

    Matching, r and unmerging are those of :class:`~.tome.ToMe`. Where blocks share plans, blocks
    that prune share one and blocks that merge another.

    Args:
        prune_depth (float): fraction of the merged blocks, in running order, that prune; in
            [0, 1]. Block number i of n prunes if i / n < prune_depth. Default 0.5: the paper
            decides by a test of linearity; half of the depth was reported as a good switch for
            ViT-B, for UNets it is our choice (docs/methods.md).
        merge (str): how the other blocks merge, 'mlerp' (default) or 'mean'.

    Source: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (Kim et al.,
    WACV 2024, arXiv 2312.01026).
    """

    def __init__(self, prune_depth: Any = 0.5, merge: Any = "mlerp") -> None:
        self.prune_depth = check_number(self.where, "prune_depth", prune_depth, 0, 1, 0.5)
        self.merge = check_choice(self.where, "merge", merge, ("mlerp", "mean"))

    def variant(self, depth: int, num_blocks: int) -> bool:
        return depth < self.prune_depth * num_blocks

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        prunes = self.variant(request.depth, request.num_blocks)
        return match_on_grid(metric, r, request, "prune" if prunes else self.merge)
