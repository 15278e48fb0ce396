# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Facility location: a few tokens that represent all others well."""

from __future__ import annotations

import torch
from torch import Tensor

# Two tokens that cover each other gain exactly the same on paper: rounding must not decide, or the
# choice would differ between devices and batch sizes.
_TIE = 1e-4


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
