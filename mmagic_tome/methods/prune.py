# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Control: ToMe's matching, but merged tokens are dropped instead of averaged."""

from __future__ import annotations

from torch import Tensor

from ..merging import Plan
from .base import Method, PlanRequest, register_method
from .tome import match_on_grid


@register_method("prune")
class Prune(Method):
    """A control, not a published method: measures the benefit of averaging itself.

    Destinations, edges and r are those of :class:`~.tome.ToMe`; a destination keeps its own
    features, the r sources are dropped and receive a copy of their destination's output.
    """

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        return match_on_grid(metric, r, request, "prune")
