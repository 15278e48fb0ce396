# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: ToMe's matching, but the merged tokens are dropped instead of averaged."""

from __future__ import annotations

from torch import Tensor

from ..merging import MergePlan
from ..merging.edges import nearest_destination, plan_of_edges, strongest
from .base import Method, PlanRequest, register_method


def match_on_grid(metric: Tensor, r: int, request: PlanRequest, reduction: str) -> MergePlan:
    """ToMe's matching on the request's layout with a reduction of choice.

    Args:
        metric (Tensor): (B, N, C).
        r (int): tokens to remove, 1 <= r <= sources.
        request (PlanRequest): layout, precision.
        reduction (str): see :func:`~mmagic_tome.merging.edges.plan_of_edges`.

    Returns:
        MergePlan: N -> N - r tokens.
    """
    destinations, sources = request.layout()
    best, nearest = nearest_destination(metric, destinations, sources, exact=request.exact)
    return plan_of_edges(destinations, sources, nearest, strongest(best, r), r, reduction)


@register_method("prune")
class Prune(Method):
    """A control, not a published method: what averaging itself is worth.

    Destinations, edges and r are those of :class:`~.tome.ToMe`; a destination keeps its own
    features, the r sources are left out and get a copy of their destination's output.
    """

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> MergePlan | None:
        r = self.removed(metric.shape[1], ratio, request)
        return match_on_grid(metric, r, request, "prune") if r > 0 else None
