# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Bipartite soft matching between given sources and destinations.

Every source draws one edge (:func:`nearest_destination`); some are chosen (:func:`strongest`) and
merge (:func:`plan_of_edges`). :func:`bipartite_match` is the three of them.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461), section
3.2, with the partition left to the caller as in arXiv 2303.17604, section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int8
from .plan import MergePlan, gather_tokens

# Largest number of similarities held at a time. On a CPU a chunk that stays in the cache
# is as fast as any larger one (2**19 to 2**22 measure the same); a GPU needs rows to fill it.
_MAX_SCORES_CPU = 1 << 19
_MAX_SCORES_GPU = 1 << 25


def tokens_to_remove(tokens: int, sources: int, ratio: float) -> int:
    """r = min(int(N * ratio), S): how many of N tokens a ratio removes, given S sources."""
    return min(int(tokens * ratio), sources)


def bipartite_match(
    metric: Tensor,
    destinations: Tensor,
    sources: Tensor,
    r: int,
    *,
    exact: bool = True,
) -> MergePlan:
    """Merge the r sources with the most similar destinations into them: N -> N - r tokens.

    Every source draws one edge to the destination with the largest cosine similarity; the r best
    edges merge (the first among equals), all other sources stay. No gradient flows through it.

    Args:
        metric (Tensor): (B, N, C) floating; what similarity is measured on.
        destinations (Tensor): (D,) or (B, D) int64 token indices, D >= 1.
        sources (Tensor): (S,) or (B, S) int64 token indices; with the destinations all N tokens.
        r (int): tokens to remove, 0 <= r <= S.
        exact (bool): default True, see :func:`nearest_destination`.

    Raises:
        ValueError: r out of range, or indices that do not add up to N.
    """
    tokens, num_dst, num_src = metric.shape[1], destinations.shape[-1], sources.shape[-1]
    if num_dst + num_src != tokens:
        raise ValueError(f"{num_dst} destinations + {num_src} sources != {tokens} tokens")
    if not 0 <= r <= num_src:
        raise ValueError(f"r must be in [0, {num_src}], got {r}")
    best, nearest = nearest_destination(metric, destinations, sources, exact)
    return plan_of_edges(destinations, sources, nearest, strongest(best, r), r)


@torch.no_grad()
def nearest_destination(
    metric: Tensor, destinations: Tensor, sources: Tensor, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Find the most similar destination of every source, by cosine similarity.

    Args:
        metric, destinations, sources: see :func:`bipartite_match`.
        exact (bool): default True. False: where the CPU has fast 8-bit products, choose by them
            (:mod:`.int8`), in a third of the time; elsewhere the same as True.

    Returns:
        tuple: similarity (B, S), dtype of ``metric``, and position among the destinations (B, S)
        int64.
    """
    if destinations.dim() > 1 or sources.dim() > 1:
        # Move destinations to the front of every entry: then one layout serves the whole batch.
        batch, count = metric.shape[0], destinations.shape[-1]
        order = torch.cat([destinations.expand(batch, -1), sources.expand(batch, -1)], dim=1)
        metric = gather_tokens(metric, order)
        place = torch.arange(order.shape[1], device=metric.device)
        destinations, sources = place[:count], place[count:]
    # Only destinations need unit length to find the nearest; dividing the best
    # score by the source's own length afterwards gives the cosine at a fraction of the work.
    # The bound on the length is one that half precision can hold: 0 / 0 would be NaN, and NaN
    # the maximum of every source.
    smallest = torch.finfo(metric.dtype).tiny
    metric = _contiguous(metric)
    dst = F.normalize(metric.index_select(1, destinations), dim=-1, eps=smallest)
    # torch 2.13 multiplies 8-bit matrices wrongly where they have a single channel.
    on_cpu = metric.device.type == "cpu"
    if on_cpu and int8.AVAILABLE and not exact and metric.shape[-1] > 1:
        return int8.nearest_int8(metric, sources, dst, _MAX_SCORES_CPU)
    src = metric.index_select(1, sources)
    best, nearest = best_scores(src, dst)
    length = torch.linalg.vector_norm(src, dim=-1)
    return best / length.clamp_min(smallest), nearest


def best_scores(
    src: Tensor, dst: Tensor, score: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The largest score of every source (B, S) and its destination (B, S) int64.

    ``score`` makes scores of the dot products (B, s, D) of (B, S, C) and (B, D, C); None: the same.
    """
    bound = _MAX_SCORES_CPU if src.device.type == "cpu" else _MAX_SCORES_GPU
    (batch, num_dst), dst = dst.shape[:2], dst.transpose(1, 2)
    found = []
    for part in src.split(max(1, bound // (batch * num_dst)), dim=1):
        scores = torch.bmm(part, dst)
        found.append((scores if score is None else score(scores)).max(dim=-1))
    if len(found) == 1:
        return tuple(found[0])
    best, nearest = zip(*found)
    return torch.cat(best, dim=1), torch.cat(nearest, dim=1)


def strongest(score: Tensor, count: int) -> Tensor:
    """Mask (B, S) of the ``count`` largest of (B, S) scores in each row; the first among equals."""
    if count >= score.shape[1]:
        return torch.ones_like(score, dtype=torch.bool)
    order = score.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def plan_of_edges(
    destinations: Tensor,
    sources: Tensor,
    nearest: Tensor,
    merged: Tensor,
    removed: int,
    destinations_first: bool = True,
) -> MergePlan:
    """Make the plan in which some of the edges merge: N -> N - r tokens.

    Slots are numbered destinations first, then the sources that stay, each in the order given, and
    represented by them. This does not synchronize with the device.

    Args:
        destinations, sources: see :func:`bipartite_match`.
        nearest (Tensor): (B, S) int64, position of each source's destination; any number where
            the edge does not merge.
        merged (Tensor): (B, S) bool, the edges that merge; ``removed`` of them in every row (not
            checked: a check would synchronize with the device).
        removed (int): r.
        destinations_first (bool): False: the sources that stay are numbered before the
            destinations. Default True.
    """
    batch, num_src = merged.shape
    num_dst = destinations.shape[-1]
    num_stay = num_src - removed
    first_dst, first_stay = (0, num_dst) if destinations_first else (num_stay, 0)
    own = torch.arange(first_dst, first_dst + num_dst, device=merged.device)
    stay = (~merged).cumsum(dim=1) + (first_stay - 1)
    slot = torch.empty(batch, num_dst + num_src, dtype=torch.int64, device=merged.device)
    slot.scatter_(1, destinations.expand(batch, -1), own.expand(batch, -1))
    into = nearest + first_dst if first_dst else nearest
    slot.scatter_(1, sources.expand(batch, -1), torch.where(merged, into, stay))
    return MergePlan(slot, num_dst + num_stay, destinations)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which products of ``x`` stay in its dtype, also under ``torch.autocast``."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def _contiguous(x: Tensor) -> Tensor:
    """The same tokens with the channels of each adjacent in memory: in a view of (B, C, h, w)
    images, gathering single tokens reads a cache line per channel."""
    if x.is_contiguous() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for to, of in zip(out, x):  # torch transposes matrices twice as fast as batches of them
        to.copy_(of)
    return out
