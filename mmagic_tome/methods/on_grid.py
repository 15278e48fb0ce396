# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Methods with one destination per cell of a grid, as ToMe for Stable Diffusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..merging import Plan, bipartite_match, nearest_destination, plan_of_edges, strongest
from ..validate import check_number
from .base import Method, PlanRequest, register_method


def match_on_grid(metric: Tensor, r: int, request: PlanRequest, reduction: str = "mean") -> Plan:
    """:func:`~mmagic_tome.merging.matching.bipartite_match` on the request's layout."""
    return bipartite_match(metric, *request.layout(), r, exact=request.exact, reduction=reduction)


@register_method("tome")
class ToMe(Method):
    """One destination per cell; the r sources closest to theirs merge into them.

    Source: "Token Merging for Fast Stable Diffusion" (Bolya and Hoffman, CVPRW 2023, arXiv
    2303.17604), section 4; the matching is that of arXiv 2210.09461, section 3.2. The metric
    is the block's input.
    """

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        return match_on_grid(metric, r, request)


@register_method("prune")
class Prune(Method):
    """A control, not a published method: measures the benefit of averaging itself.

    Destinations, edges and r are those of :class:`ToMe`; a destination keeps its own features,
    the r sources are dropped and receive a copy of their destination's output.
    """

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        return match_on_grid(metric, r, request, "prune")


@register_method("tofu")
class ToFu(Method):
    """ToMe's matching; early blocks prune, the later ones merge with MLERP.

    The paper's argument: averaging two inputs is harmless where a block is close to linear. Early
    blocks are not: they keep the destination's own features. Later blocks merge, with the direction
    of the average at the largest norm among the merged (:class:`~mmagic_tome.merging.MlerpPlan`).
    Where blocks share plans, blocks that prune share one and blocks that merge another.

    Args:
        prune_depth (float): fraction of the merged blocks, in running order, that prune; in
            [0, 1]. Block number i of n prunes if i / n < prune_depth. Default 0.5: the paper
            decides by a test of linearity; half of the depth was reported as a good switch for
            ViT-B, for UNets it is our choice (docs/explanation/method_notes.md).

    Source: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (Kim et al.,
    WACV 2024, arXiv 2312.01026).
    """

    def __init__(self, prune_depth: Any = 0.5) -> None:
        self.prune_depth = check_number(self.where, "prune_depth", prune_depth, 0, 1, 0.5)

    def variant(self, depth: int, num_blocks: int) -> bool:
        return depth < self.prune_depth * num_blocks

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        prunes = self.variant(request.depth, request.num_blocks)
        return match_on_grid(metric, r, request, "prune" if prunes else "mlerp")


@register_method("threshold")
class Threshold(Method):
    """CA-ToMe: merge every source whose similarity to its destination is at least a threshold.

    Destinations and edges are those of :class:`ToMe`. With c_b the number of sources of batch
    entry b whose cosine similarity to their destination is >= threshold,

        r = min(max_b c_b, int(N * ratio))

    and the r most similar sources of every entry merge: ``ratio`` is the largest fraction ever
    removed (the paper has no such limit: write the ceiling, ratio=0.75 for cells of 2 x 2). All
    entries keep the same number of tokens: as in the authors' package ``ca-tome`` 0.1.3, those
    with fewer similar sources also merge some below the threshold.

    r depends on the data, so making a plan synchronizes with the device once; a compiled graph
    breaks there. The paper's caching, matching at listed steps only, is ``plan_interval`` of
    :class:`~mmagic_tome.ToMeConfig`.

    Args:
        threshold (float): cosine similarity in [-1, 1]. Default 0.7, which the paper uses
            to test caching. At 1 only exact copies merge.

    Source: "Cached Adaptive Token Merging" (Saghatchian et al., arXiv 2501.00946).
    """

    def __init__(self, threshold: Any = 0.7) -> None:
        self.threshold = check_number(self.where, "threshold", threshold, -1, 1, 0.7)

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan | None:
        destinations, sources = request.layout()
        best, nearest = nearest_destination(metric, destinations, sources, exact=request.exact)
        r = min(int((best >= self.threshold).sum(dim=1).max()), r)
        if r == 0:
            return None
        return plan_of_edges(destinations, sources, nearest, strongest(best, r), r)
