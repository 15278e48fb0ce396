# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nearest destinations by 8-bit dot products, for CPUs that have instructions for them.

The product of all sources with all destinations is nearly the whole cost of token merging on a
CPU. In 8 bits (AVX512-VNNI) it takes a fifth of the time. It only chooses a source's destination,
with sums in exact 32-bit integers; their similarity, and so which sources merge, is computed in
full precision afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Without these instructions the 8-bit product is slower than the 32-bit one.
_vnni_supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)

#: Whether this machine's CPU multiplies 8-bit integers faster than floats.
AVAILABLE = _vnni_supported() and torch.backends.mkldnn.is_available()


def nearest_int8(
    metric: Tensor, sources: Tensor, unit_destination: Tensor, max_scores: int
) -> tuple[Tensor, Tensor]:
    """As :func:`~.matching.nearest_destination`, with destinations chosen to 8 bits.

    Every source is rounded to 255 levels of its own largest entry (a positive factor per row does
    not change which destination is the largest), all destinations of a batch entry to 255 levels
    of their common largest entry. Two destinations whose similarities to a source differ by less
    than about 0.5 % may be confused; the similarity to the one chosen is in full precision.

    Args:
        metric (Tensor): (B, N, C) floating, on a CPU, C > 1.
        sources (Tensor): (S,) int64 token indices.
        unit_destination (Tensor): (B, D, C) floating, rows of unit length (or zero).
        max_scores (int): bound on the similarities held at a time.
    """
    batch, num_src = metric.shape[0], sources.shape[0]
    num_dst = unit_destination.shape[1]
    smallest = torch.finfo(metric.dtype).tiny
    best = metric.new_empty(batch, num_src)
    nearest = torch.empty(batch, num_src, dtype=torch.int64)
    rows = min(num_src, max(1, max_scores // num_dst))
    for b in range(batch):
        tokens, destination = metric[b], unit_destination[b]
        rounded = _rounded(destination, destination.abs().amax()).t()
        # All the steps of a chunk before the next: intermediate tensors stay in the cache.
        for start in range(0, num_src, rows):
            part = tokens.index_select(0, sources[start : start + rows])
            largest = part.abs().amax(dim=-1, keepdim=True)  # the norm for it is 15 times slower
            choice = torch._int_mm(_rounded(part, largest), rounded).argmax(dim=-1)
            chosen = destination.index_select(0, choice)
            length = torch.linalg.vector_norm(part, dim=-1).clamp_min(smallest)
            best[b, start : start + rows] = torch.linalg.vecdot(part, chosen) / length
            nearest[b, start : start + rows] = choice
    return best, nearest


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    # In float32: half precision cannot hold 127 times the inverse of a small number.
    scale = 127 / largest.float().clamp_min(1e-30)
    return (x * scale).round_().to(torch.int8)
