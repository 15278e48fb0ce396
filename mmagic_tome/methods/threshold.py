# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CA-ToMe's adaptive merging: as many tokens as are similar enough."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..merging import Plan, nearest_destination, plan_of_edges, strongest
from ..validate import check_choice, check_number
from .base import Method, PlanRequest, register_method


@register_method("threshold")
class Threshold(Method):
    """Merge every source whose similarity to its destination is at least a threshold.

    Destinations and edges are those of :class:`~.tome.ToMe`. With c_b the number of sources of
    batch entry b whose cosine similarity to their destination is >= threshold,

        r = min(c, int(N * ratio)),    c = max_b c_b  or  min_b c_b

    and the r most similar sources of every entry merge: ``ratio`` is the largest fraction ever
    removed (the paper has no such limit: write the ceiling, ratio=0.75 for cells of 2 x 2).

    All entries of a batch must keep the same number of tokens. With ``batch='max'``, as in the
    authors' package ``ca-tome`` 0.1.3, entries with fewer similar sources also merge some below
    the threshold; with ``'min'`` entries with more similar sources keep some of them.

    r depends on the data, so making a plan synchronizes with the device once (one number is
    copied to the host); a compiled graph breaks there. The paper's caching, matching at listed
    steps only, is ``plan_interval`` of :class:`~mmagic_tome.ToMeConfig`.

    Args:
        threshold (float): cosine similarity in [-1, 1]. Default 0.7, which the paper uses
            to test caching. At 1 only exact copies merge.
        batch (str): 'max' (default) or 'min'.

    Source: "Cached Adaptive Token Merging" (Saghatchian et al., arXiv 2501.00946).
    """

    def __init__(self, threshold: Any = 0.7, batch: Any = "max") -> None:
        self.threshold = check_number(self.where, "threshold", threshold, -1, 1, 0.7)
        self.batch = check_choice(self.where, "batch", batch, ("max", "min"))

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan | None:
        destinations, sources = request.layout()
        best, nearest = nearest_destination(metric, destinations, sources, exact=request.exact)
        counts = (best >= self.threshold).sum(dim=1)
        count = counts.max() if self.batch == "max" else counts.min()
        r = min(int(count), r)
        if r == 0:
            return None
        return plan_of_edges(destinations, sources, nearest, strongest(best, r), r)
