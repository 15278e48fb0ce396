# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The published functions of "Token Merging: Your ViT But Faster" (arXiv 2210.09461).

A matching returns ``merge`` and ``unmerge``. Written from descriptions of the paper.

``merge(x, mode='mean')``: (B, N, C) -> (B, M, C), modes of :data:`MODES`; ``unmerge(y)``: (B, M, C)
-> (B, N, C), every token a copy of its slot, in the original order. Both are differentiable;
``merge.plan`` is the :class:`~.plan.MergePlan`, None where nothing merges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import MergePlan
from .random import hashed_integers
from .sequence import combine, match_tokens, merge_best, total_size

#: Modes of ``merge``: 'drop' keeps the features of the destination alone.
MODES = ("mean", "sum", "amax", "drop")
Functions = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Functions:
    """Merge even tokens into odd ones along the r most similar pairs.

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
        tuple: merge, unmerge.
    """
    token = _check_metric(metric)
    if class_token or not distill_token:
        return _functions(match_tokens(metric, r, class_token + distill_token))
    # Of three tokens the second is protected: there is nothing to merge into.
    r = min(r, (len(token) - 1) // 2)
    if r <= 0 or len(token) == 3:
        return _functions(None)
    plan = merge_best(metric, token[1:2], token[::2], token[3::2], r)
    slot = torch.where(plan.slot < 2, 1 - plan.slot, plan.slot)
    first, second, *others = plan.representative.unbind(1)
    return _functions(MergePlan(slot, plan.num_slots, torch.stack([second, first, *others], 1)))


@torch.no_grad()
def kth_bipartite(metric: Tensor, k: int) -> Functions:
    """Every k-th token is a destination, all others merge: N -> N // k tokens, in their order.

    Args:
        metric (Tensor): as in :func:`bipartite_soft_matching`.
        k (int): in [1, N], otherwise ValueError; 1 merges nothing. Tokens behind the last
            destination merge like the others.
    """
    token = _check_metric(metric)
    if not 1 <= k <= len(token):
        raise ValueError(f"k must be in [1, N={len(token)}], got {k}")
    if k == 1:
        return _functions(None)
    destinations, sources = token[k - 1 :: k], token[: -(len(token) // k)]
    # By arithmetic: a mask would synchronize with the device.
    sources = sources + sources // (k - 1)
    return _functions(merge_best(metric, token[:0], sources, destinations, len(sources)))


@torch.no_grad()
def random_bipartite(metric: Tensor, r: int, seed: int = 0) -> Functions:
    """r tokens drawn at random merge, each into the most similar of all others.

    Args:
        metric (Tensor): as in :func:`bipartite_soft_matching`.
        r (int): tokens to remove; at most N - 1 are.
        seed (int): of the draw, which is a hash: no generator is read, and the whole batch has the
            same. Default 0.
    """
    token = _check_metric(metric)
    r = min(r, len(token) - 1)
    if r <= 0:
        return _functions(None)
    drawn = hashed_integers(1 << 30, seed, None, 1, len(token), token.device)[0]
    order = drawn.argsort(stable=True)
    sources, destinations = order[:r].sort().values, order[r:].sort().values
    return _functions(merge_best(metric, token[:0], sources, destinations, r))


def merge_wavg(
    merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average weighted by size, sum(s x) / sum(s): merged tokens (B, M, C), sizes (B, M, 1).

    Args:
        merge: of one of the matchings here, or any function like it.
        x (Tensor): (B, N, C).
        size (Tensor | None): (B, N, 1), how many patches each token represents; None: one each.
    """
    size = torch.ones_like(x[..., :1]) if size is None else size
    plan = getattr(merge, "plan", None)
    if plan is not None:
        return combine(plan, x, size[..., 0]), total_size(plan, size[..., 0])[..., None]
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the first tokens each token represents: (B, M, N0) of zeros and ones.

    Args:
        merge: of one of the matchings here.
        x (Tensor): (B, N, C), for its shape and device only.
        source (Tensor | None): (B, N, N0), the result of the layer before; None: tokens represent
            themselves.
    """
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def _functions(plan: MergePlan | None) -> Functions:
    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if plan is None:
            return x
        if mode == "drop":
            return combine(plan, x, None, "drop")
        return plan.merge(x, "max" if mode == "amax" else mode)

    merge.plan = plan
    return merge, lambda y: y if plan is None else plan.unmerge(y)


def _check_metric(metric: Tensor) -> Tensor:
    """The tokens' numbers."""
    if metric.dim() != 3 or not metric.is_floating_point():
        found = f"{tuple(metric.shape)}, {metric.dtype}"
        raise ValueError(f"metric must be (B, N, C) and floating, got {found}")
    return torch.arange(metric.shape[1], device=metric.device)
