# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Importance-based merging: tokens that the text moves stay, the others merge into them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merging import MergePlan
from ..merging.edges import nearest_destination, plan_of_edges, strongest
from .base import Method, PlanRequest, register_method
from .options import check_integer, check_number
from .prune import match_on_grid


@register_method("importance")
class Importance(Method):
    """Merging guided by the magnitude of classifier-free guidance.

    The importance of a place is how far the text moved the prediction there at the last step::

        heat = mean over channels of |eps_text - eps_empty|         (B / 2, h', w')

    scaled to the block's grid by averaging. With K = N - r tokens to keep:

    1. pool: the min(pool * K, N) most important tokens;
    2. destinations: min(destinations * N, K) of the pool, drawn at random;
    3. all tokens outside of the pool merge with their most similar destination;
    4. of the pool's other tokens, as many as are still too many merge, the most similar to
       their destinations first; the rest stay as they are.

    Both halves of classifier-free guidance have the same pool and destinations; each finds its
    own edges. During the first ``prune_steps`` steps of a run nothing is averaged: merged tokens
    are dropped and get a copy of their destination's output.

    Where there is no heat (the first step of a run; a model called without the two halves in one
    batch; training) the destinations and edges are those of :class:`~.tome.ToMe`.

    Args:
        pool (float): size of the pool, as a multiple of K; at least 1. Default 1.4.
        destinations (float): destinations, as a share of N; in (0, 1]. Default 0.25.
        prune_steps (int): first steps that prune. Default 2.

    Raises:
        ToMeError: an option out of range.

    Source: "Importance-Based Token Merging for Efficient Image and Video Generation" (Wu et al.,
    ICCV 2025, arXiv 2411.16720).
    """

    tracks_steps = True
    watches_output = True

    def __init__(self, pool: Any = 1.4, destinations: Any = 0.25, prune_steps: Any = 2) -> None:
        self.pool = check_number("importance", "pool", pool, 1, math.inf, 1.4)
        self.destinations = check_number(
            "importance", "destinations", destinations, 0, 1, 0.25, open_low=True
        )
        self.prune_steps = check_integer("importance", "prune_steps", prune_steps, 0, 10**6)

    def plan(self, metric: Tensor, ratio: float, request: PlanRequest) -> MergePlan | None:
        batch, tokens, _ = metric.shape
        r = self.removed(tokens, ratio, request)
        if r <= 0:
            return None
        reduction = "prune" if request.step < self.prune_steps else "mean"
        heat = heat_on_grid(request, batch)
        if heat is None:
            return match_on_grid(metric, r, request, reduction)
        kept = tokens - r
        pool = min(int(self.pool * kept), tokens)
        count = max(1, min(int(self.destinations * tokens), kept))
        order = heat.argsort(dim=1, descending=True, stable=True)
        # The same places in the ranking for all, so that halves with the same heat agree.
        shuffled = request.draw(1 << 31, pool).argsort(stable=True)
        destinations = order[:, shuffled[:count]]
        sources = torch.cat([order[:, shuffled[count:]], order[:, pool:]], dim=1)
        best, nearest = nearest_destination(metric, destinations, sources, exact=request.exact)
        rest = best[:, : pool - count]
        merged = torch.ones_like(best, dtype=torch.bool)
        merged[:, : pool - count] = strongest(rest, pool - kept)
        return plan_of_edges(destinations, sources, nearest, merged, r, reduction)


def heat_on_grid(request: PlanRequest, batch: int) -> Tensor | None:
    """Heat of every token.

    Args:
        request (PlanRequest): heat (H, h', w') or None, and the grid.
        batch (int): B.

    Returns:
        Tensor | None: (B, N) float32, each of the H maps for B / H entries (the empty and the
        text half of guidance); None without heat or where B is no multiple of H.
    """
    heat = request.heat
    if heat is None or batch % heat.shape[0]:
        return None
    heat = F.adaptive_avg_pool2d(heat[:, None].float(), (request.height, request.width))
    return heat.flatten(1).repeat(batch // heat.shape[0], 1)
