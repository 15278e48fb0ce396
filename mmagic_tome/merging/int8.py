# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nearest destinations by 8-bit dot products, for CPUs that have instructions for them.

In full precision the product of all sources with all destinations is nearly all that token
merging costs on a CPU. In 8 bits (AVX512-VNNI) it takes a fifth of the time. Only the choice of a
source's destination is made from it, with sums in exact 32-bit integers; how similar the two are,
and so which sources merge, is worked out in full precision afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _fast_here() -> bool:
    # Without these instructions the 8-bit product is slower than the 32-bit one.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return (
        supported is not None
        and supported()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch, "_int_mm")
    )


#: Whether this machine's CPU multiplies 8-bit integers faster than floats.
AVAILABLE = _fast_here()


def nearest_int8(source: Tensor, unit_destination: Tensor, max_scores: int) -> Tensor:
    """Position of the destination with the largest cosine similarity, to 8 bits.

    Every source is rounded to 255 levels of its own largest entry (a positive factor per row does
    not change which destination is the largest), all destinations of a batch entry to 255 levels
    of their common largest entry. Two destinations whose similarities to a source differ by less
    than about 0.5 % may be confused.

    Args:
        source (Tensor): (B, S, C) floating, on a CPU, C > 1.
        unit_destination (Tensor): (B, D, C) floating, rows of unit length (or zero).
        max_scores (int): bound on the similarities held at a time; at least one row of D is.

    Returns:
        Tensor: (B, S) int64.
    """
    batch, num_src, _ = source.shape
    num_dst = unit_destination.shape[1]
    src = _rounded(source, source.abs().amax(dim=-1, keepdim=True))
    dst = _rounded(unit_destination, unit_destination.abs().amax(dim=(1, 2), keepdim=True))
    dst = dst.transpose(1, 2)
    rows = min(num_src, max(1, max_scores // num_dst))
    parts = [
        torch._int_mm(part, dst[b]).argmax(dim=-1)
        for b in range(batch)
        for part in src[b].split(rows)
    ]
    return torch.cat(parts).view(batch, num_src)


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    # In float32: half precision cannot hold 127 times the inverse of a small number.
    scale = 127 / largest.float().clamp_min(1e-30)
    return (x * scale).round_().to(torch.int8)
