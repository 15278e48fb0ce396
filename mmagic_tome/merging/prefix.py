# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A plan for tokens that have others in front of them, which never merge."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import MergePlan


class PrefixedPlan:
    """``count`` tokens that stay as they are, followed by those of another plan.

    For modules that work on text and picture in one sequence: the text is in front and is never
    merged. The same surface as :class:`~.plan.MergePlan`, with the text counted in.

    Args:
        plan (MergePlan): of the tokens behind; any class with its surface.
        count (int): how many are in front, at least 0.
    """

    __slots__ = ("count", "plan")

    def __init__(self, plan: MergePlan, count: int) -> None:
        self.plan = plan
        self.count = count

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
        """(B, count + M) int64: those in front stand for themselves."""
        behind = self.plan.representative + self.count
        front = torch.arange(self.count, device=behind.device)
        return torch.cat([front.expand(self.batch, -1), behind], dim=1)

    def merge(self, x: Tensor) -> Tensor:
        """(B, count + N, C) -> (B, count + M, C)."""
        return torch.cat([x[:, : self.count], self.plan.merge(x[:, self.count :])], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, count + M, C) -> (B, count + N, C)."""
        return torch.cat([y[:, : self.count], self.plan.unmerge(y[:, self.count :])], dim=1)

    def __repr__(self) -> str:
        return f"PrefixedPlan({self.count} tokens + {self.plan!r})"
