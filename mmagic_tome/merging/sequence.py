# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Bipartite soft matching for sequences of tokens without a grid: vision transformers.

:func:`match_tokens` is what models use; below it the published functions.

Source: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3
for the matching and the weighted average, its ablations for the alternatives. Written from
descriptions of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import (
    best_scores,
    full_precision,
    nearest_destination,
    plan_of_edges,
    strongest,
)
from .plan import MergePlan, check_shape, gather_tokens
from .random import hashed_integers

#: Similarity of two tokens.
DISTANCES = ("cosine", "dot", "euclidean", "softmax")
#: Which tokens may be merged (A) into which (B).
PARTITIONS = ("alternating", "sequential", "random")
#: How tokens of one slot are combined.
COMBINATIONS = ("weighted", "mean", "max", "drop")
#: Modes of ``merge(x, mode)``; 'drop' keeps the features of the destination alone.
MODES = ("mean", "sum", "prod", "amax", "amin", "drop")


@dataclass(frozen=True)
class Match:
    """A matching of N tokens into M slots, for tokens that carry sizes.

    Attributes:
        plan (MergePlan): slots are in the published order: protected tokens, the tokens of A that
            stay, the tokens of B; the last two each in the order that they have among the tokens.
    """

    plan: MergePlan

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Combine the tokens of each slot: (B, N, C) floating -> (B, M, C), the dtype of ``x``.

        Raises:
            ValueError: a mode that is not in :data:`MODES`, or a shape that does not fit.
        """
        _check(mode, "mode", MODES)
        plan = self.plan
        direct = {"mean": "mean", "sum": "sum", "amax": "max"}.get(mode)
        if direct is not None:
            return plan.merge(x, direct)
        if mode == "amin":
            return -plan.merge(-x, "max")
        check_shape(x, plan.batch, plan.num_tokens, "merge")
        if mode == "drop":
            return gather_tokens(x, plan.representative)
        ones = x.new_ones(x.shape[0], plan.num_slots, x.shape[-1])
        return ones.scatter_reduce(1, plan.slot[..., None].expand_as(x), x, "prod")

    def combine(self, x: Tensor, size: Tensor | None, how: str = "weighted") -> Tensor:
        """Combine tokens that already represent several.

        Args:
            x (Tensor): (B, N, C).
            size (Tensor | None): (B, N), how many of the first tokens each represents; None: one.
            how (str): 'weighted' (default): sum(s x) / sum(s); 'mean', 'max' or 'drop' of the
                tokens as they are.

        Returns:
            Tensor: (B, M, C), the dtype of ``x``.
        """
        if how != "weighted" or size is None:
            return self.merge(x, {"weighted": "mean", "max": "amax"}.get(how, how))
        # Weights that sum to one rather than a division at the end: sums of half-precision
        # tokens times their sizes may not fit half precision.
        weight = size / self.plan.unmerge(self.total(size)[..., None])[..., 0]
        return self.plan.merge(x * weight[..., None].to(x.dtype), "sum")

    def total(self, size: Tensor | None) -> Tensor:
        """Sizes of the slots, (B, N) or None -> (B, M) float32 (float64 stays)."""
        if size is None:
            return self.plan.size.to(torch.float32)
        return self.plan.merge(size[..., None], "sum")[..., 0]


@torch.no_grad()
def match_tokens(
    metric: Tensor,
    r: int,
    prefix: int = 0,
    distance: str = "cosine",
    partition: str = "alternating",
    seed: int = 0,
    stream: int = 0,
) -> Match | None:
    """Merge r tokens of A into their most similar tokens of B; None if nothing can be merged.

    Every token of A draws one edge; the r best edges merge (the first among equals).

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
    _check(distance, "distance", DISTANCES)
    _check(partition, "partition", PARTITIONS)
    token = torch.arange(metric.shape[1], device=metric.device)
    protected, rest = token[:prefix], token[prefix:]
    half = rest.shape[0] // 2
    if r <= 0 or half == 0:
        return None
    if partition == "alternating":
        sources, destinations = rest[prefix % 2 :: 2], rest[1 - prefix % 2 :: 2]
    elif partition == "sequential":
        sources, destinations = rest[:half], rest[half:]
    else:
        sources, destinations = _draw(rest, half, seed, stream)
    return _merge_best(metric, protected, sources, destinations, min(r, half), distance)


def _draw(token: Tensor, count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """(count,) tokens drawn by a hash and the others, each in their order."""
    number = hashed_integers(1 << 30, seed, None, stream + 1, token.shape[0], token.device)[stream]
    order = number.argsort(stable=True)
    return token[order[:count].sort().values], token[order[count:].sort().values]


def _merge_best(
    metric: Tensor,
    protected: Tensor,
    sources: Tensor,
    destinations: Tensor,
    r: int,
    distance: str = "cosine",
) -> Match:
    """The r best edges merge; slots: protected, sources that stay, destinations."""
    if metric.dtype not in (torch.float32, torch.float64):
        metric = metric.float()
    with full_precision(metric):
        score, nearest = _nearest(metric, sources, destinations, distance)
    # The protected are sources that stay.
    count = protected.shape[0]
    merged, nearest = (F.pad(part, (count, 0)) for part in (strongest(score, r), nearest))
    sources = torch.cat([protected, sources])
    plan = plan_of_edges(destinations, sources, nearest, merged, r, destinations_first=False)
    return Match(plan)


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


def _check(value: str, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


# --- the published functions --------------------------------------------------------------------

Functions = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Functions:
    """The published matching: even tokens into odd ones, the r most similar pairs.

    The order of merged tokens is the published one: class token, distillation token, the tokens of
    A that stay, the tokens of B. The paper's text leaves the order of A open where there is no
    class token; here it is always that of the input. A distillation token without a class token
    keeps its position, the second, behind the first token of A that stays.

    Args:
        metric (Tensor): (B, N, C) floating, otherwise ValueError; similarity is the cosine. No
            gradient flows through the matching.
        r (int): tokens to remove, at most half of the unprotected. 0 or less: both functions
            return their argument.
        class_token (bool): token 0, in A, is never merged. Default False.
        distill_token (bool): token 1, the first of B, is never merged into. Default False.

    Returns:
        tuple: ``merge(x, mode='mean')``: (B, N, C) -> (B, M, C), modes of :data:`MODES`, and
        ``unmerge(y)``: (B, M, C) -> (B, N, C), every token a copy of its slot, in the original
        order. Both are differentiable; ``merge.match`` is the :class:`Match` (None at r = 0).
    """
    token = _tokens(metric)
    if class_token or not distill_token:
        return _functions(match_tokens(metric, r, class_token + distill_token))
    # Of three tokens the second is protected: there is nothing to merge into.
    r = min(r, (len(token) - 1) // 2)
    if r <= 0 or len(token) == 3:
        return _functions(None)
    match = _merge_best(metric, token[1:2], token[::2], token[3::2], r)
    # The protected token comes second, behind the first token of A that stays.
    slot = match.plan.slot
    slot = torch.where(slot < 2, 1 - slot, slot)
    return _functions(Match(MergePlan(slot, match.plan.num_slots, match.plan.representative)))


@torch.no_grad()
def kth_bipartite(metric: Tensor, k: int) -> Functions:
    """Every k-th token is a destination, all others merge: N -> N // k tokens.

    Metric and functions are as in :func:`bipartite_soft_matching`; merged tokens are the
    destinations in their order.

    Args:
        k (int): in [1, N], otherwise ValueError; 1 merges nothing. Tokens behind the last
            destination merge like the others.
    """
    token = _tokens(metric)
    if not 1 <= k <= len(token):
        raise ValueError(f"k must be in [1, N={len(token)}], got {k}")
    if k == 1:
        return _functions(None)
    destinations, sources = token[k - 1 :: k], token[: -(len(token) // k)]
    # By arithmetic: a mask would synchronize with the device.
    sources = sources + sources // (k - 1)
    return _functions(_merge_best(metric, token[:0], sources, destinations, len(sources)))


@torch.no_grad()
def random_bipartite(metric: Tensor, r: int, seed: int = 0) -> Functions:
    """r tokens drawn at random merge, each into the most similar of all others.

    Metric and functions are as in :func:`bipartite_soft_matching`; merged tokens are those not
    drawn, in their order.

    Args:
        r (int): tokens to remove; at most N - 1 are.
        seed (int): of the draw, which is a hash: no generator is read, and the whole batch has the
            same. Default 0.
    """
    token = _tokens(metric)
    r = min(r, len(token) - 1)
    if r <= 0:
        return _functions(None)
    return _functions(_merge_best(metric, token[:0], *_draw(token, r, seed, 0), r))


def merge_wavg(
    merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average weighted by size: sum(s x) / sum(s).

    Args:
        merge: of one of the matchings here.
        x (Tensor): (B, N, C).
        size (Tensor | None): (B, N, 1), how many patches each token represents; None: one each.

    Returns:
        tuple: merged tokens (B, M, C) and their sizes (B, M, 1).
    """
    if size is None:
        size = torch.ones_like(x[..., :1])
    match = getattr(merge, "match", None)
    if match is not None:
        return match.combine(x, size[..., 0]), match.total(size[..., 0])[..., None]
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the first tokens each token represents.

    Args:
        merge: of one of the matchings here.
        x (Tensor): (B, N, C), for its shape and device only.
        source (Tensor | None): (B, N, N0), the result of the previous layer; None: tokens
            represent themselves.

    Returns:
        Tensor: (B, M, N0) of zeros and ones; every column has a single one.
    """
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def _functions(match: Match | None) -> Functions:
    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        _check(mode, "mode", MODES)
        return x if match is None else match.merge(x, mode)

    merge.match = match
    return merge, (lambda y: y) if match is None else match.plan.unmerge


def _tokens(metric: Tensor) -> Tensor:
    """(N,) token indices of (B, N, C)."""
    if metric.dim() != 3:
        raise ValueError(f"metric must be (B, N, C), got {tuple(metric.shape)}")
    return torch.arange(metric.shape[1], device=metric.device)
