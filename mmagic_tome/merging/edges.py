# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""From edges between sources and destinations to a plan, for methods that choose their own.

:func:`~.matching.bipartite_match` does it all for one layout that serves the whole batch and
averages. Here the steps are apart, and every batch entry may have destinations of its own:

1. :func:`nearest_destination`: every source draws one edge;
2. :func:`strongest`, or a rule of the method's own: which edges merge;
3. :func:`plan_of_edges`: the plan, averaging, pruning or MLERP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matching import _nearest_destination
from .plan import MergePlan
from .reductions import MlerpPlan, PrunedPlan

#: What a slot holds, see :mod:`.reductions`.
REDUCTIONS = ("mean", "prune", "mlerp")


@torch.no_grad()
def nearest_destination(
    metric: Tensor, destinations: Tensor, sources: Tensor, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """The most similar destination of every source, by cosine similarity, in chunks.

    Args:
        metric (Tensor): (B, N, C) floating.
        destinations (Tensor): (D,) or (B, D) int64 token indices, D >= 1.
        sources (Tensor): (S,) or (B, S) int64 token indices.
        exact (bool): see :func:`~.matching.bipartite_match`. Default True.

    Returns:
        tuple: similarity (B, S) and position among the destinations (B, S) int64.
    """
    if destinations.dim() == 1 and sources.dim() == 1:
        return _nearest_destination(metric, destinations, sources, None, exact)
    # Put destinations first in every entry: then one layout serves the whole batch.
    batch, channels = metric.shape[0], metric.shape[2]
    order = torch.cat([destinations.expand(batch, -1), sources.expand(batch, -1)], dim=1)
    moved = metric.gather(1, order[..., None].expand(-1, -1, channels))
    place = torch.arange(order.shape[1], device=metric.device)
    count = destinations.shape[-1]
    return _nearest_destination(moved, place[:count], place[count:], None, exact)


def strongest(score: Tensor, count: int) -> Tensor:
    """Mask (B, S) of the ``count`` largest of (B, S) scores in each row; the first among equals."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def plan_of_edges(
    destinations: Tensor,
    sources: Tensor,
    nearest: Tensor,
    merged: Tensor,
    removed: int,
    reduction: str = "mean",
) -> MergePlan:
    """The plan in which some of the edges merge.

    Slots are numbered destinations first, then the sources that stay, each in the order given.
    Without sorting and without waiting for the device.

    Args:
        destinations (Tensor): (D,) or (B, D) int64 token indices.
        sources (Tensor): (S,) or (B, S) int64; with the destinations all N tokens.
        nearest (Tensor): (B, S) int64, position of each source's destination.
        merged (Tensor): (B, S) bool, the edges that merge; ``removed`` True in every row (not
            checked: a check would wait for the device).
        removed (int): r.
        reduction (str): 'mean' (default), 'prune' (the destination's own features) or 'mlerp'.

    Returns:
        MergePlan: N -> N - r tokens.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    batch, num_src = merged.shape
    num_dst = destinations.shape[-1]
    num_slots = num_dst + num_src - removed
    destinations = destinations.expand(batch, -1)
    sources = sources.expand(batch, -1)
    own = torch.arange(num_dst, device=merged.device).expand(batch, -1)
    stay = num_dst - 1 + (~merged).cumsum(dim=1)
    slot = torch.empty(batch, num_dst + num_src, dtype=torch.int64, device=merged.device)
    slot.scatter_(1, destinations, own)
    slot.scatter_(1, sources, torch.where(merged, nearest, stay))
    if reduction == "mean":
        return MergePlan(slot, num_slots, destinations)
    if reduction == "mlerp":
        return MlerpPlan(slot, num_slots, destinations)
    # Merged sources write into a column more, which is cut off.
    kept = torch.empty(batch, num_slots + 1, dtype=torch.int64, device=merged.device)
    kept[:, :num_dst] = destinations
    kept.scatter_(1, stay.masked_fill(merged, num_slots), sources)
    return PrunedPlan(slot, kept[:, :num_slots].contiguous())
