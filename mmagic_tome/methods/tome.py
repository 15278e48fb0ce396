# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ToMe: similar tokens become one, with destinations spread over the grid."""

from __future__ import annotations

from torch import Tensor

from ..merging import Plan, bipartite_match
from .base import Method, PlanRequest, register_method


@register_method("tome")
class ToMe(Method):
    """One destination per cell; the r sources closest to theirs merge into them.

    Source: "Token Merging for Fast Stable Diffusion" (Bolya and Hoffman, CVPRW 2023, arXiv
    2303.17604), section 4; the matching is that of arXiv 2210.09461, section 3.2. The metric
    is the block's input.
    """

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        return bipartite_match(metric, *request.layout(), r, exact=request.exact)
