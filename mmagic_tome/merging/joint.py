# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plans for joint sequences of text and image tokens, as in MM-DiT; the text never merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Plan


class JointPlan:
    """Plan for T text tokens around the N image tokens of another plan.

    The text stays as it is and where it is: what precedes the image precedes it, what follows it
    follows it.

    Args:
        plan (Plan): of the image tokens.
        num_text_tokens (int): T, at least 0.
        num_before (int | Sequence[int] | None): how many text tokens precede the image, in every
            batch entry or in each. Default None: all.
    """

    __slots__ = ("num_before", "num_text_tokens", "plan")

    def __init__(
        self, plan: Plan, num_text_tokens: int, num_before: int | Sequence[int] | None = None
    ) -> None:
        self.plan = plan
        self.num_text_tokens = num_text_tokens
        if num_before is None:
            num_before = num_text_tokens
        elif isinstance(num_before, (list, tuple)) and len(set(num_before)) == 1:
            num_before = num_before[0]
        self.num_before = num_before

    @property
    def batch(self) -> int:
        """B."""
        return self.plan.batch

    @property
    def num_tokens(self) -> int:
        """T + N."""
        return self.num_text_tokens + self.plan.num_tokens

    @property
    def num_slots(self) -> int:
        """T + M."""
        return self.num_text_tokens + self.plan.num_slots

    @property
    def slot(self) -> Tensor:
        """(B, T + N) int64; every text token has a slot of its own."""
        return self._indices(self.plan.slot, self.num_slots)

    @property
    def size(self) -> Tensor:
        """(B, T + M), the dtype of the inner plan's; 1 for text tokens."""
        size = self.plan.size
        text = size.new_ones(self.batch, self.num_text_tokens, 1)
        return join_sequence(text, size[..., None], self.num_before)[..., 0]

    @property
    def representative(self) -> Tensor:
        """(B, T + M) int64; text tokens represent themselves."""
        return self._indices(self.plan.representative, self.num_tokens)

    def merge(self, x: Tensor) -> Tensor:
        """(B, T + N, C) -> (B, T + M, C)."""
        text, image = self._split(x)
        return join_sequence(text, self.plan.merge(image), self.num_before)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, T + M, C) -> (B, T + N, C)."""
        text, image = self._split(y)
        return join_sequence(text, self.plan.unmerge(image), self.num_before)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return split_sequence(x, self.num_text_tokens, self.num_before)

    def _indices(self, image: Tensor, length: int) -> Tensor:
        """(B, K) indices among the image tokens -> (B, T + K) among ``length`` joint tokens."""
        place = torch.arange(length, device=image.device).expand(self.batch, -1)
        text, places = self._split(place[..., None])
        return join_sequence(text, places.gather(1, image[..., None]), self.num_before)[..., 0]

    def __repr__(self) -> str:
        return f"JointPlan({self.num_text_tokens} text tokens, {self.plan!r})"


def joint_plan(plan: Plan, length: int, num_before: int | Sequence[int] | None = None) -> Plan:
    """Extend an image's plan to a sequence of ``length`` tokens, all others being text.

    Args:
        plan (Plan): of N image tokens.
        length (int): T + N. At T = 0 ``plan`` itself is returned.
        num_before: see :class:`JointPlan`.
    """
    num_text_tokens = length - plan.num_tokens
    return JointPlan(plan, num_text_tokens, num_before) if num_text_tokens else plan


def split_sequence(
    x: Tensor, num_text_tokens: int, num_before: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Split a joint sequence.

    Args:
        x (Tensor): (B, T + L, C).
        num_text_tokens (int): T.
        num_before (int | Sequence[int]): text tokens in front of the image, per batch or entry.

    Returns:
        tuple: text (B, T, C) and image (B, L, C).
    """
    length = x.shape[1] - num_text_tokens
    if not isinstance(num_before, (list, tuple)):
        end = num_before + length
        text = x[:, :num_before]
        if end < x.shape[1]:
            text = torch.cat([text, x[:, end:]], dim=1)
        return text, x[:, num_before:end]
    first = torch.tensor(num_before, device=x.device)[:, None]
    text = torch.arange(num_text_tokens, device=x.device)
    text = text + length * (text >= first)
    return _rows(x, text), _rows(x, first + torch.arange(length, device=x.device))


def join_sequence(text: Tensor, image: Tensor, num_before: int | Sequence[int]) -> Tensor:
    """Invert :func:`split_sequence`: (B, T, C) and (B, L, C) -> (B, T + L, C)."""
    if not isinstance(num_before, (list, tuple)):
        return torch.cat([text[:, :num_before], image, text[:, num_before:]], dim=1)
    num_text_tokens, length = text.shape[1], image.shape[1]
    first = torch.tensor(num_before, device=image.device)[:, None]
    place = torch.arange(num_text_tokens + length, device=image.device)
    row = torch.where(place < first + length, num_text_tokens + place - first, place - length)
    row = torch.where(place < first, place, row)
    return _rows(torch.cat([text, image], dim=1), row)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
