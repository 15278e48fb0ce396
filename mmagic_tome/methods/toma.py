# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ToMA: destinations by facility location, merging and unmerging as matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merging import MatrixPlan, Plan, make_windows
from ..merging.matching import full_precision
from ..merging.plan import gather_tokens
from ..validate import check_choice, check_integer, check_number
from .base import Method, PlanRequest, register_method

# Eigenvalues below this fraction of the largest count as zero in a pseudo-inverse.
_RTOL = 1e-5
# Two tokens that cover each other gain exactly the same on paper: rounding must not decide, or the
# choice would differ between devices and batch sizes.
_TIE = 1e-4


@register_method("toma")
class ToMA(Method):
    """Soft merging in local windows, without sorting and scattering.

    In every window of n tokens x with unit vectors u, S = u u^T (n, n), and D destinations
    (:func:`facility_location` on S; S_D is their rows)::

        A   = softmax(S_D / temperature) over the destinations     (D, n), columns sum to 1
        A~  = A / row sums                                         (D, n), rows sum to 1
        merge     y = A~ x
        unmerge   x' = A^T y           'transpose'
                  x' = A~^+ y          'pinv', the pseudo-inverse A~^T (A~ A~^T)^+

    Both kinds of unmerging restore equal tokens exactly: the columns of A sum to 1, hence a vector
    of ones is in the row space of A~.

    With W windows, r // W tokens (at most n - 1) are removed in each: up to W - 1 fewer than
    ratio * N, and none where that is less than one per window. Windows are ``window`` x
    ``window`` or slightly smaller (:func:`~mmagic_tome.merging.make_windows`); tokens at
    the edge that fit into none stay as they are. Cells (``sx``, ``sy``) only bound the ratio.

    The paper reuses one choice of destinations for many layers and steps: here ``share_plans=True``
    with a ``plan_interval`` (:class:`~mmagic_tome.ToMeConfig`).

    Args:
        window (int): largest side of a window in tokens, in [2, 32]; memory grows as N *
            window**2. Default 8.
        temperature (float): of the softmax over cosines, above 0. Default 0.03. Smaller is
            closer to plain merging; at 1 all destinations hold nearly the same average.
        unmerge (str): 'transpose' (default) or 'pinv'.

    Source: "ToMA: Token Merge with Attention for Diffusion Models" (Lu et al., ICML 2025, arXiv
    2509.10918). The axis of the softmax and its temperature are our choice, by the error of
    self-attention on the demo model, see docs/explanation/method_notes.md.
    """

    def __init__(
        self, window: Any = 8, temperature: Any = 0.03, unmerge: Any = "transpose"
    ) -> None:
        self.window = check_integer(self.where, "window", window, 2, 32)
        self.temperature = check_number(
            self.where, "temperature", temperature, 0, 100, 0.03, open_low=True
        )
        self.unmerge = check_choice(self.where, "unmerge", unmerge, ("transpose", "pinv"))

    @torch.no_grad()
    def match(self, metric: Tensor, r: int, request: PlanRequest) -> Plan | None:
        windows = make_windows(request.height, request.width, self.window, metric.device)
        removed = min(r // windows.count, windows.size - 1)
        if removed <= 0:
            return None
        # The temperature multiplies the rounding of half-precision cosines.
        with full_precision(metric):
            weights, back = self.matrices(metric[:, windows.inside].flatten(0, 1).float(), removed)
        return MatrixPlan(weights.to(metric.dtype), back.to(metric.dtype), windows)

    def matrices(self, x: Tensor, removed: int) -> tuple[Tensor, Tensor]:
        """(G, D, n) and (G, n, D) float32 matrices, for (G, n, C) tokens and n - D removed."""
        unit = F.normalize(x, dim=-1)
        similarity = torch.bmm(unit, unit.transpose(1, 2))
        chosen = facility_location(similarity, x.shape[1] - removed)
        rows = gather_tokens(similarity, chosen)
        share = (rows / self.temperature).softmax(dim=1)
        weights = share / share.sum(dim=-1, keepdim=True)
        if self.unmerge == "transpose":
            return weights, share.transpose(1, 2)
        transposed = weights.transpose(1, 2)
        gram = torch.bmm(weights, transposed)
        return weights, torch.bmm(transposed, torch.linalg.pinv(gram, hermitian=True, rtol=_RTOL))


@torch.no_grad()
def facility_location(similarity: Tensor, count: int) -> Tensor:
    """Greedily maximise f(D) = sum_i max_{j in D} S_ij over sets D of ``count`` tokens.

    f is submodular and monotone, so the greedy set reaches at least 1 - 1/e of the best one's
    value above the empty set's (Nemhauser et al., 1978). With m_i the best similarity of token i
    to the tokens chosen so far (-1, the smallest cosine, before the first), each round adds the j
    with the largest gain sum_i max(0, S_ij - m_i), the first of those within 1e-4 of it.

    Args:
        similarity (Tensor): (G, n, n) floating, symmetric, in [-1, 1]; G independent groups.
        count (int): tokens to choose per group, 1 <= count <= n.

    Returns:
        Tensor: (G, count) int64, in the order of choice; no token twice.
    """
    groups, tokens, _ = similarity.shape
    covered = similarity.new_full((groups, 1, tokens), -1)
    taken = torch.zeros(groups, tokens, dtype=torch.bool, device=similarity.device)
    first = torch.arange(tokens, 0, -1, device=similarity.device)
    chosen = []
    for _ in range(count):
        # Rows instead of columns, which is the same by symmetry, are contiguous in memory.
        gain = (similarity - covered).clamp_min_(0).sum(dim=-1)
        gain = gain.masked_fill_(taken, -1)
        good = gain >= gain.amax(dim=-1, keepdim=True) - _TIE
        choice = (good * first).argmax(dim=-1, keepdim=True)
        chosen.append(choice)
        taken = taken.scatter(1, choice, True)
        row = similarity.gather(1, choice[..., None].expand(-1, -1, tokens))
        covered = torch.maximum(covered, row)
    return torch.cat(chosen, dim=1)
