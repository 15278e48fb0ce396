# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: ToMe's matching, but merged tokens are dropped instead of averaged."""

from __future__ import annotations

from torch import Tensor

from ..merging import Plan, bipartite_match
from .base import Method, PlanRequest, register_method


def match_on_grid(metric: Tensor, r: int, request: PlanRequest, reduction: str) -> Plan:
    """ToMe's matching on the request's layout, with any reduction.

    Args:
        metric (Tensor): (B, N, C).
        r (int): tokens to remove, 1 <= r <= sources.
        request (PlanRequest): its layout and precision.
        reduction (str): see :func:`~mmagic_tome.merging.matching.plan_of_edges`.

    Returns:
        Plan: N -> N - r tokens.
    """
    destinations, sources = request.layout()
    return bipartite_match(
        metric, destinations, sources, r, exact=request.exact, reduction=reduction
    )


@register_method("prune")
class Prune(Method):
    """A control, not a published method: measures the benefit of averaging itself.

    Destinations, edges and r are those of :class:`~.tome.ToMe`; a destination keeps its own
    features, the r sources are dropped and receive a copy of their destination's output.
    """

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> Plan | None:
        r = self.removed(metric.shape[1], ratio, request)
        return match_on_grid(metric, r, request, "prune") if r > 0 else None
