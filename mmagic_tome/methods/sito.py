# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""SiTo: prune tokens similar to the most typical token of some cell."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merging import Plan, bipartite_match, grid_layout
from ..merging.grid2d import tile_grid
from ..merging.matching import full_precision
from ..validate import check_number
from .base import Method, PlanRequest, register_method


@register_method("sito")
class SiTo(Method):
    """Choose base tokens by total similarity; prune the tokens most similar to them.

    ::

        SimScore_i = sum_j cos(x_i, x_j) = u_i · sum_j u_j                       u = x / |x|
        score_i    = sim_beta * SimScore_i + noise_alpha * std(SimScore) * n_i   n_i ~ N(0, 1)
        base token of a cell = its token with the largest score
        every other token draws an edge to its most similar base token
        the r best edges: prune the token; its output is a copy of its base token's

    The noise keeps the choice from being the same at every step. It is a hash of (seed, timestep,
    block, token), the same for all batch entries, so that the two halves of classifier-free
    guidance differ by their tokens alone. Tokens outside of complete cells are no base tokens.

    Args:
        noise_alpha (float): weight of the noise, at least 0. Default 0.1, the authors'. The unit
            of the noise is our choice: the scores' standard deviation over the image, so that
            the same weight has the same effect at every number of tokens.
        sim_beta (float): weight of the similarities, at least 0. Default 1, the authors'; at 0 the
            noise alone decides.

    Source: "Training-Free and Hardware-Friendly Acceleration for Diffusion Models via
    Similarity-based Token Pruning" (Zhang et al., AAAI 2025, doi 10.1609/aaai.v39i9.33071).
    """

    def __init__(self, noise_alpha: Any = 0.1, sim_beta: Any = 1.0) -> None:
        self.noise_alpha = check_number(self.where, "noise_alpha", noise_alpha, 0, math.inf, 0.1)
        self.sim_beta = check_number(self.where, "sim_beta", sim_beta, 0, math.inf, 1.0)

    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan:
        offset = self.base_tokens(metric, request)
        layout = grid_layout(offset, request.height, request.width, request.sx, request.sy)
        chosen = layout.select(slice(None))
        return bipartite_match(metric, *chosen, r, exact=request.exact, reduction="prune")

    @torch.no_grad()
    def base_tokens(self, metric: Tensor, request: PlanRequest) -> Tensor:
        """Position of the base token inside every cell, (B, cells) int64 in [0, sx * sy)."""
        mass = similarity_mass(metric)
        score = self.sim_beta * mass
        if self.noise_alpha > 0:
            noise = gaussian(request, metric.shape[1]).to(score.device)
            spread = mass.std(dim=1, unbiased=False, keepdim=True)
            score = score + self.noise_alpha * spread * noise
        cells = tile_grid(request.height, request.width, request.sy, request.sx, score.device)
        return score[:, cells.inside].argmax(dim=-1)


def similarity_mass(metric: Tensor) -> Tensor:
    """(B, N) float32: sum of every token's cosine similarities to all tokens, itself included."""
    unit = F.normalize(metric.float(), dim=-1)
    with full_precision(metric):
        return torch.einsum("bnc,bc->bn", unit, unit.sum(dim=1))


def gaussian(request: PlanRequest, count: int) -> Tensor:
    """(count,) float32 standard normal numbers from a request's random ones (Box-Muller)."""
    drawn = request.draw(1 << 24, 2 * count).view(2, count).float()
    # Centres of 2**24 bins: float32 can hold them, and none is 0, which has no logarithm.
    radius, angle = (drawn + 0.5) / (1 << 24)
    return (-2 * radius.log()).clamp_min(0).sqrt() * (2 * math.pi * angle).cos()
