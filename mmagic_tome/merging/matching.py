# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Bipartite soft matching between given sources and destinations.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv
2210.09461), section 3.2, with the partition left to the caller as in arXiv
2303.17604, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int8
from .plan import MergePlan

# Largest number of similarities held at a time. On a CPU a chunk that stays in the cache
# is as fast as any larger one (2**19 to 2**22 measure alike); a GPU wants rows to fill it.
_MAX_SCORES_CPU = 1 << 19
_MAX_SCORES_GPU = 1 << 25


def tokens_to_remove(tokens: int, sources: int, ratio: float) -> int:
    """r = min(int(N * ratio), S): how many of N tokens a ratio removes, given S sources."""
    return min(int(tokens * ratio), sources)


@torch.no_grad()
def bipartite_match(
    metric: Tensor,
    destinations: Tensor,
    sources: Tensor,
    r: int,
    max_scores: int | None = None,
    exact: bool = True,
) -> MergePlan:
    """Merge the r sources that have the closest destinations into them.

    Every source draws one edge to the destination with the largest cosine
    similarity; the r best edges merge, all other sources stay. No gradient
    flows through the matching.

    Slots are numbered destinations first, in the order given, then the sources
    that stay.

    Args:
        metric (Tensor): (B, N, C) floating; what similarity is measured on.
        destinations (Tensor): (D,) int64 token indices, D >= 1, the same for the whole batch.
        sources (Tensor): (S,) int64 token indices; with the destinations all N tokens.
        r (int): tokens to remove, 0 <= r <= S.
        max_scores (int | None): bound on the similarities held at a time (of
            all B * S * D); default 2**19 on a CPU, 2**25 elsewhere. At least
            one row of B * D is always held.
        exact (bool): default True. False: where the CPU has fast 8-bit products, choose
            each source's destination by them (:mod:`.int8`), at a third of the time; elsewhere
            the same as True.

    Returns:
        MergePlan: N -> N - r tokens.

    Raises:
        ValueError: no destinations, r out of range, or indices that do not add up to N.
    """
    batch, tokens, _ = metric.shape
    num_dst, num_src = destinations.shape[0], sources.shape[0]
    if num_dst == 0:
        raise ValueError("at least one destination is needed")
    if num_dst + num_src != tokens:
        raise ValueError(f"{num_dst} destinations + {num_src} sources != {tokens} tokens")
    if not 0 <= r <= num_src:
        raise ValueError(f"r must be in [0, {num_src}], got {r}")

    best, nearest = _nearest_destination(metric, destinations, sources, max_scores, exact)
    if r == num_src:
        source_slot = nearest
    else:
        order = best.argsort(dim=-1, descending=True)
        stay = torch.arange(num_dst, tokens - r, device=metric.device).expand(batch, -1)
        source_slot = nearest.scatter(1, order[:, r:], stay)
    slot = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    slot[:, destinations] = torch.arange(num_dst, device=metric.device)
    slot[:, sources] = source_slot
    return MergePlan(slot, tokens - r, destinations)


def _nearest_destination(
    metric: Tensor, destinations: Tensor, sources: Tensor, max_scores: int | None, exact: bool
) -> tuple[Tensor, Tensor]:
    """Best cosine similarity and the position of its destination, each (B, S)."""
    on_cpu = metric.device.type == "cpu"
    if max_scores is None:
        max_scores = _MAX_SCORES_CPU if on_cpu else _MAX_SCORES_GPU
    # Only destinations need unit length to find the nearest; dividing the best
    # score by the source's own length afterwards gives the cosine at a fraction of the work.
    # The bound on the length is one that half precision can hold: 0 / 0 would be NaN, and NaN
    # the maximum of every source.
    smallest = torch.finfo(metric.dtype).tiny
    metric = _row_by_row(metric)
    dst = F.normalize(metric.index_select(1, destinations), dim=-1, eps=smallest)
    # torch 2.13 multiplies 8-bit matrices wrongly where they have a single channel.
    if on_cpu and int8.AVAILABLE and not exact and metric.shape[-1] > 1:
        return int8.nearest_int8(metric, sources, dst, max_scores)
    src = metric.index_select(1, sources)
    best, nearest = _best_of_all(src, dst.transpose(1, 2), max_scores)
    length = torch.linalg.vector_norm(src, dim=-1)
    return best / length.clamp_min(smallest), nearest


def _row_by_row(x: Tensor) -> Tensor:
    """The same tokens with the channels of each next to one another in memory.

    A network of convolutions gives its blocks a view of (B, C, h, w) pictures, where they are
    not; gathering single tokens out of that reads a cache line per channel.
    """
    if x.is_contiguous() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for to, of in zip(out, x):  # torch transposes matrices twice as fast as batches of them
        to.copy_(of)
    return out


def _best_of_all(src: Tensor, dst: Tensor, max_scores: int) -> tuple[Tensor, Tensor]:
    """Largest dot product of every source, and where; (B, S, C) with (B, C, D)."""
    batch, num_src, num_dst = src.shape[0], src.shape[1], dst.shape[2]
    rows = max(1, max_scores // (batch * num_dst))
    if rows >= num_src:
        return torch.bmm(src, dst).max(dim=-1)
    parts = [torch.bmm(part, dst).max(dim=-1) for part in src.split(rows, dim=1)]
    best = torch.cat([values for values, _ in parts], dim=1)
    nearest = torch.cat([indices for _, indices in parts], dim=1)
    return best, nearest
