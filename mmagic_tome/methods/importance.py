# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Importance-based merging: tokens with strong guidance stay, the others merge into them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merging import Plan, nearest_destination, plan_of_edges, strongest
from ..validate import check_integer, check_number
from .base import Method, PlanRequest, register_method
from .on_grid import match_on_grid


@register_method("importance")
class Importance(Method):
    """Merging guided by the magnitude of classifier-free guidance.

    The importance of a position is the magnitude of guidance there at the last step::

        guidance_map = mean over channels of |eps_text - eps_empty|         (B / 2, h', w')

    scaled to the block's grid by averaging. With K = N - r tokens to keep:

    1. pool: the min(pool * K, N) most important tokens;
    2. destinations: min(destinations * N, K) of the pool, drawn at random;
    3. all tokens outside of the pool merge with their most similar destination;
    4. of the pool's other tokens, those most similar to their destinations merge until K tokens
       remain; the rest stay as they are.

    Both halves of classifier-free guidance have the same pool and destinations; each draws its
    own edges. During the first ``prune_steps`` steps of a run nothing is averaged: merged tokens
    are dropped and receive a copy of their destination's output.

    Without a guidance map (the first step of a run; a model called without the two halves in one
    batch; training) the destinations and edges are those of :class:`~.on_grid.ToMe`.

    Args:
        pool (float): size of the pool, as a multiple of K; at least 1. Default 1.4.
        destinations (float): destinations, as a fraction of N; in (0, 1]. Default 0.25.
        prune_steps (int): number of first steps that prune. Default 2.

    Source: "Importance-Based Token Merging for Efficient Image and Video Generation" (Wu et al.,
    ICCV 2025, arXiv 2411.16720).
    """

    tracks_steps = True
    watches_output = True

    def __init__(self, pool: Any = 1.4, destinations: Any = 0.25, prune_steps: Any = 2) -> None:
        self.pool = check_number(self.where, "pool", pool, 1, math.inf, 1.4)
        self.destinations = check_number(
            self.where, "destinations", destinations, 0, 1, 0.25, open_low=True
        )
        self.prune_steps = check_integer(self.where, "prune_steps", prune_steps, 0, 10**6)

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        batch, tokens, _ = metric.shape
        reduction = "prune" if request.step < self.prune_steps else "mean"
        importance = guidance_map_on_grid(request, batch)
        if importance is None:
            return match_on_grid(metric, r, request, reduction)
        kept = tokens - r
        pool = min(int(self.pool * kept), tokens)
        count = max(1, min(int(self.destinations * tokens), kept))
        order = importance.argsort(dim=1, descending=True, stable=True)
        # The same ranks for all entries, so that both halves of guidance agree.
        shuffled = request.draw(1 << 31, pool).argsort(stable=True)
        destinations = order[:, shuffled[:count]]
        sources = torch.cat([order[:, shuffled[count:]], order[:, pool:]], dim=1)
        best, nearest = nearest_destination(metric, destinations, sources, exact=request.exact)
        merged = torch.ones_like(best, dtype=torch.bool)
        merged[:, : pool - count] = strongest(best[:, : pool - count], pool - kept)
        return plan_of_edges(destinations, sources, nearest, merged, r, reduction)


def guidance_map_on_grid(request: PlanRequest, batch: int) -> Tensor | None:
    """Magnitude of guidance at every token, (B, N) float32.

    Each of the (G, h', w') maps serves B / G entries, the empty and the text half of guidance.
    None without a map or where B is no multiple of G.
    """
    maps = request.guidance_map
    if maps is None or batch % maps.shape[0]:
        return None
    maps = F.adaptive_avg_pool2d(maps[:, None].float(), (request.height, request.width))
    return maps.flatten(1).repeat(batch // maps.shape[0], 1)
