# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A plan for a sequence in which others stand beside the tokens that merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import MergePlan


class BesidePlan:
    """``count`` tokens that stay as they are, around those of another plan.

    For modules that work on text and picture in one sequence: the text is never merged. The order
    stays: what was in front is in front, what was behind is behind. The same surface as
    :class:`~.plan.MergePlan`, with the others counted in.

    Args:
        plan (MergePlan): of the N tokens that merge; any class with its surface.
        count (int): how many others there are, at least 0.
        before (int | Sequence[int] | None): how many of them are in front, of every entry of the
            batch or of each; the rest is behind. Default None: all.
    """

    __slots__ = ("before", "count", "plan")

    def __init__(
        self, plan: MergePlan, count: int, before: int | Sequence[int] | None = None
    ) -> None:
        self.plan = plan
        self.count = count
        if before is None:
            before = count
        elif isinstance(before, (list, tuple)) and len(set(before)) == 1:
            before = before[0]
        self.before = before

    @property
    def batch(self) -> int:
        """B."""
        return self.plan.batch

    @property
    def num_tokens(self) -> int:
        """count + N."""
        return self.count + self.plan.num_tokens

    @property
    def num_slots(self) -> int:
        """count + M."""
        return self.count + self.plan.num_slots

    @property
    def representative(self) -> Tensor:
        """(B, count + M) int64: the others stand for themselves."""
        kept = self.plan.representative
        places = torch.arange(self.num_tokens, device=kept.device).expand(self.batch, -1)
        others, tokens = apart(places[..., None], self.count, self.before)
        return together(others, tokens.gather(1, kept[..., None]), self.before)[..., 0]

    def merge(self, x: Tensor) -> Tensor:
        """(B, count + N, C) -> (B, count + M, C)."""
        others, tokens = apart(x, self.count, self.before)
        return together(others, self.plan.merge(tokens), self.before)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, count + M, C) -> (B, count + N, C)."""
        others, merged = apart(y, self.count, self.before)
        return together(others, self.plan.unmerge(merged), self.before)

    def __repr__(self) -> str:
        return f"BesidePlan({self.count} tokens beside {self.plan!r})"


def beside(
    plan: MergePlan | BesidePlan, length: int, before: int | Sequence[int] | None = None
) -> MergePlan | BesidePlan:
    """The plan for a sequence of ``length`` tokens in which those of ``plan`` are; ``before`` as
    in :class:`BesidePlan`."""
    count = length - plan.num_tokens
    return BesidePlan(plan, count, before) if count else plan


def apart(x: Tensor, count: int, before: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, count + L, C) -> the others (B, count, C), and the L tokens behind ``before`` of them."""
    length = x.shape[1] - count
    if not isinstance(before, (list, tuple)):
        end = before + length
        others = [x[:, :before], x[:, end:]]
        others = torch.cat(others, dim=1) if end < x.shape[1] else others[0]
        return others, x[:, before:end]
    first = torch.tensor(before, device=x.device)[:, None]
    other = torch.arange(count, device=x.device)
    other = other + length * (other >= first)
    return _rows(x, other), _rows(x, first + torch.arange(length, device=x.device))


def together(others: Tensor, tokens: Tensor, before: int | Sequence[int]) -> Tensor:
    """The counterpart of :func:`apart`."""
    if not isinstance(before, (list, tuple)):
        return torch.cat([others[:, :before], tokens, others[:, before:]], dim=1)
    count, length = others.shape[1], tokens.shape[1]
    first = torch.tensor(before, device=tokens.device)[:, None]
    place = torch.arange(count + length, device=tokens.device)
    row = torch.where(place < first + length, count + place - first, place - length)
    row = torch.where(place < first, place, row)
    return _rows(torch.cat([others, tokens], dim=1), row)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
