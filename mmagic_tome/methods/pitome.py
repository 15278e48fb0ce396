# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""PiToMe: merge in clusters of similar tokens, protect isolated ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merging import Plan, nearest_destination, plan_of_edges
from ..merging.matching import by_chunks, full_precision
from ..validate import check_number
from .base import Method, PlanRequest, register_method

# Largest number of similarities held at a time, as in merging/matching.py.
_MAX_SCORES = 1 << 20


@register_method("pitome")
class PiToMe(Method):
    """Bipartite matching among the tokens with the highest energy.

    ::

        E_i  = 1/N sum_j f(cos(x_i, x_j))
        f(c) = c                              where c >= m
               alpha * (exp(c - m) - 1)       elsewhere
        m    = margin * (1 - depth / num_blocks)

    The 2r tokens of the highest energy, those in large clusters of similar ones, are assigned in
    falling order alternately to A (first, third, ...) and B; every token of A merges with its most
    similar token of B; all others are protected. So ``ratio`` is at most 0.5. The grid does not
    enter. Where blocks share a plan, it has the margin of the first of them. Energies take all N²
    similarities, of which 2**20 are held at a time.

    Args:
        margin (float): m at the first merged block, in [0, 1]; it falls linearly with the
            block's number to margin / num_blocks at the last. Default 0.9
            (docs/explanation/method_notes.md).
        alpha (float): slope below the margin, at least 0. Default 1.

    Source: "Accelerating Transformers with Spectrum-Preserving Token Merging" (Tran et al.,
    NeurIPS 2024, arXiv 2405.16148), the energy score and its margin. The paper is on ViTs and
    uses keys as the metric; here it is the block's input, as for all methods.
    """

    ceiling = 0.5

    def __init__(self, margin: Any = 0.9, alpha: Any = 1.0) -> None:
        self.margin = check_number(self.where, "margin", margin, 0, 1, 0.9)
        self.alpha = check_number(self.where, "alpha", alpha, 0, math.inf, 1.0)

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        r = min(r, metric.shape[1] // 2)
        margin = self.margin * (1 - request.depth / request.num_blocks)
        order = energy(metric, margin, self.alpha).argsort(dim=1, descending=True, stable=True)
        a, b, protected = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
        _, nearest = nearest_destination(metric, b, a, exact=request.exact)
        # The protected are sources that stay: their edges are never used.
        sources = torch.cat([a, protected], dim=1)
        nearest = F.pad(nearest, (0, protected.shape[1]))
        merged = torch.zeros_like(sources, dtype=torch.bool)
        merged[:, :r] = True
        return plan_of_edges(b, sources, nearest, merged, r)


@torch.no_grad()
def energy(metric: Tensor, margin: float, alpha: float) -> Tensor:
    """(B, N) float32 energy of every token, see :class:`PiToMe`; ``margin`` is m."""

    def mean(score: Tensor) -> Tensor:
        below = alpha * torch.expm1(score - margin)
        return torch.where(score >= margin, score, below).mean(dim=-1)

    unit = F.normalize(metric.float(), dim=-1)
    with full_precision(metric):
        return torch.cat(by_chunks(unit, unit, _MAX_SCORES, mean), dim=1)
