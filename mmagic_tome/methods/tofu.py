# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ToFu: prune where the network is far from linear, merge with MLERP where it is close to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..merging import MergePlan
from .base import Method, PlanRequest, register_method
from .options import check_choice, check_number
from .prune import match_on_grid


@register_method("tofu")
class ToFu(Method):
    """ToMe's matching; early blocks prune, the later ones merge with MLERP.

    The paper's argument: averaging two inputs is harmless where f(average) = average of f, that
    is where a block is close to linear; where it is sensitive to averaged inputs, pruning is the
    better choice. The earlier blocks are the sensitive ones: they keep the destination's own
    features (pruning), later ones merge. And since an average is shorter than what it averages,
    merging is MLERP: the direction of the average at the largest length among the merged
    (:class:`~mmagic_tome.merging.reductions.MlerpPlan`).

    Matching, r and unmerging are those of :class:`~.tome.ToMe`. Where the blocks of a level share
    a plan, those that prune share one and those that merge another.

    Args:
        prune_depth (float): share of the merged blocks, in running order, that prune; in [0, 1].
            Block number i of n prunes if i / n < prune_depth. Default 0.5: the paper decides
            by a test of linearity; that half of the depth is a good switch was reported for
            ViT-B, for UNets it is our choice (docs/methods.md).
        merge (str): how the others merge, 'mlerp' (default) or 'mean'.

    Raises:
        ToMeError: an option out of range.

    Source: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (Kim et al.,
    WACV 2024, arXiv 2312.01026).
    """

    def __init__(self, prune_depth: Any = 0.5, merge: Any = "mlerp") -> None:
        self.prune_depth = check_number("tofu", "prune_depth", prune_depth, 0, 1, 0.5)
        self.merge = check_choice("tofu", "merge", merge, ("mlerp", "mean"))

    def variant(self, depth: int, depths: int) -> bool:
        return depth < self.prune_depth * depths

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> MergePlan | None:
        r = self.removed(metric.shape[1], ratio, request)
        if r <= 0:
            return None
        prunes = self.variant(request.depth, request.depths)
        return match_on_grid(metric, r, request, "prune" if prunes else self.merge)
