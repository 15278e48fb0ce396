# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Bipartite soft matching for sequences of tokens without a grid: vision transformers.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3
for the matching and the weighted average, its ablations for the alternatives. Written from
descriptions of the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import best_scores, full_precision, nearest_destination, plan_of_edges, strongest
from .plan import MergePlan, gather_tokens
from .random import hashed_integers

#: Similarity of two tokens.
DISTANCES = ("cosine", "dot", "euclidean", "softmax")
#: Which tokens may be merged (A) into which (B).
PARTITIONS = ("alternating", "sequential", "random")
#: How tokens of one slot are combined.
COMBINATIONS = ("weighted", "mean", "max", "drop")


@torch.no_grad()
def match_tokens(
    metric: Tensor,
    r: int,
    prefix: int = 0,
    distance: str = "cosine",
    partition: str = "alternating",
    seed: int = 0,
    stream: int = 0,
) -> MergePlan | None:
    """Merge r tokens of A into their most similar tokens of B; None if nothing can be merged.

    Every token of A draws one edge; the r best edges merge (the first among equals). Slots are in
    the published order: protected tokens, the tokens of A that stay, the tokens of B; the last two
    each in the order that they have among the tokens.

    Args:
        metric (Tensor): (B, N, C) floating. Half precision is matched in float32.
        r (int): tokens to remove; at most half of the unprotected ones are removed.
        prefix (int): how many tokens at the front are protected: neither merged nor merged into.
        distance (str): 'cosine' (default), 'dot', 'euclidean', or 'softmax': edges lead to the
            largest dot product and are ranked by the weight that a softmax over B, scaled by
            1 / sqrt(C) as in attention, assigns to it (our reading: the paper only names it).
        partition (str): 'alternating' (default): A has the tokens at even positions, B those at
            odd ones, counted with the protected; 'sequential': A is the first half of the
            unprotected; 'random': A is a hashed half, the same for the whole batch.
        seed (int): of the random partition. Default 0.
        stream (int): a number per layer for the random partition.

    Raises:
        ValueError: an unknown distance or partition.
    """
    for name, value, known in (
        ("distance", distance, DISTANCES),
        ("partition", partition, PARTITIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    token = torch.arange(metric.shape[1], device=metric.device)
    protected, rest = token[:prefix], token[prefix:]
    half = rest.shape[0] // 2
    if r <= 0 or half == 0:
        return None
    r = min(r, half)
    if partition == "alternating":
        sources, destinations = rest[prefix % 2 :: 2], rest[1 - prefix % 2 :: 2]
    else:
        if partition == "random":
            number = hashed_integers(1 << 30, seed, None, stream + 1, rest.shape[0], rest.device)
            rest = rest[number[stream].argsort(stable=True)]
        sources, destinations = rest[:half].sort().values, rest[half:].sort().values
    return merge_best(metric, protected, sources, destinations, r, distance)


def merge_best(
    metric: Tensor,
    protected: Tensor,
    sources: Tensor,
    destinations: Tensor,
    r: int,
    distance: str = "cosine",
) -> MergePlan:
    """Merge the r best edges; slots: protected tokens, sources that stay, destinations."""
    if metric.dtype not in (torch.float32, torch.float64):
        metric = metric.float()
    with full_precision(metric):
        score, nearest = _nearest(metric, sources, destinations, distance)
    # The protected are sources that stay.
    count = protected.shape[0]
    merged, nearest = (F.pad(part, (count, 0)) for part in (strongest(score, r), nearest))
    sources = torch.cat([protected, sources])
    return plan_of_edges(destinations, sources, nearest, merged, r, destinations_first=False)


def _nearest(
    metric: Tensor, sources: Tensor, destinations: Tensor, distance: str
) -> tuple[Tensor, Tensor]:
    """Score of the best edge of every source and the position of its destination, (B, S) each."""
    if distance == "cosine":
        return nearest_destination(metric, destinations, sources)
    src, dst = metric.index_select(1, sources), metric.index_select(1, destinations)
    if distance == "dot":
        return best_scores(src, dst)
    if distance == "softmax":
        return best_scores(src * metric.shape[-1] ** -0.5, dst, lambda x: x.log_softmax(dim=-1))
    # -|a - b|^2 / 2 = a b - |b|^2 / 2 - |a|^2 / 2: a product with one more channel. Around
    # the mean of all tokens, so that little is lost where they are far from the origin.
    mean = metric.mean(1, keepdim=True)
    src, dst = src - mean, dst - mean
    half = dst.square().sum(-1, keepdim=True) / 2
    best, nearest = best_scores(F.pad(src, (0, 1), value=-1.0), torch.cat([dst, half], -1))
    return best - src.square().sum(-1) / 2, nearest


def combine(plan: MergePlan, x: Tensor, size: Tensor | None, how: str = "weighted") -> Tensor:
    """Combine tokens that already represent several: (B, N, C) -> (B, M, C), the dtype of ``x``.

    Args:
        size (Tensor | None): (B, N), how many of the first tokens each represents; None: one.
        how (str): 'weighted' (default): sum(s x) / sum(s); 'mean' or 'max' of the tokens as they
            are; 'drop': the destination alone.
    """
    if how == "drop":
        return gather_tokens(x, plan.representative)
    if how != "weighted" or size is None:
        return plan.merge(x, "max" if how == "max" else "mean")
    # Weights that sum to one rather than a division at the end: sums of half-precision
    # tokens times their sizes may not fit half precision.
    weight = size / plan.unmerge(total_size(plan, size)[..., None])[..., 0]
    return plan.merge(x * weight[..., None].to(x.dtype), "sum")


def total_size(plan: MergePlan, size: Tensor | None) -> Tensor:
    """Sizes of the slots, (B, N) or None (all are one) -> (B, M) float32 (float64 stays)."""
    if size is None:
        return plan.size.to(torch.float32)
    return plan.merge(size[..., None], "sum")[..., 0]
