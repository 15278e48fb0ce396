# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plans for joint sequences of text and image tokens, as in MM-DiT; the text never merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Plan, gather_tokens


class JointPlan:
    """Plan for T text tokens around the N image tokens of another plan: T + N -> T + M.

    The text stays as it is and where it is. Every text token has a slot of its own.

    Args:
        plan (Plan): of the image tokens.
        num_text_tokens (int): T, at least 0.
        num_before (int | Sequence[int] | None): how many text tokens precede the image, in every
            batch entry or in each. Default None: all.
    """

    __slots__ = ("batch", "num_before", "num_slots", "num_text_tokens", "num_tokens", "plan")

    def __init__(
        self, plan: Plan, num_text_tokens: int, num_before: int | Sequence[int] | None = None
    ) -> None:
        if num_before is None:
            num_before = num_text_tokens
        elif isinstance(num_before, (list, tuple)) and len(set(num_before)) == 1:
            num_before = num_before[0]
        self.plan = plan
        self.num_text_tokens = num_text_tokens
        self.num_before = num_before
        self.batch = plan.batch
        self.num_tokens = num_text_tokens + plan.num_tokens
        self.num_slots = num_text_tokens + plan.num_slots

    @property
    def slot(self) -> Tensor:
        return self._indices(self.plan.slot, self.num_slots)

    @property
    def size(self) -> Tensor:
        size = self.plan.size
        text = size.new_ones(self.batch, self.num_text_tokens, 1)
        return join_sequence(text, size[..., None], self.num_before)[..., 0]

    @property
    def representative(self) -> Tensor:
        return self._indices(self.plan.representative, self.num_tokens)

    def merge(self, x: Tensor) -> Tensor:
        text, image = self._split(x)
        return join_sequence(text, self.plan.merge(image), self.num_before)

    def unmerge(self, y: Tensor) -> Tensor:
        text, image = self._split(y)
        return join_sequence(text, self.plan.unmerge(image), self.num_before)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return split_sequence(x, self.num_text_tokens, self.num_before)

    def _indices(self, image: Tensor, length: int) -> Tensor:
        """(B, K) indices among the image tokens -> (B, T + K) among ``length`` joint tokens."""
        place = torch.arange(length, device=image.device).expand(self.batch, -1)
        text, places = self._split(place[..., None])
        return join_sequence(text, places.gather(1, image[..., None]), self.num_before)[..., 0]


def joint_plan(plan: Plan, length: int, num_before: int | Sequence[int] | None = None) -> Plan:
    """:class:`JointPlan` for a sequence of ``length`` = T + N; at T = 0 ``plan`` itself."""
    num_text_tokens = length - plan.num_tokens
    return JointPlan(plan, num_text_tokens, num_before) if num_text_tokens else plan


def split_sequence(
    x: Tensor, num_text_tokens: int, num_before: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Split a joint sequence (B, T + L, C) into text (B, T, C) and image (B, L, C); ``num_before``
    is that of :class:`JointPlan`."""
    length = x.shape[1] - num_text_tokens
    if not isinstance(num_before, (list, tuple)):
        end = num_before + length
        text = x[:, :num_before]
        if end < x.shape[1]:
            text = torch.cat([text, x[:, end:]], dim=1)
        return text, x[:, num_before:end]
    text, image = _places(num_text_tokens, length, num_before, x.device)
    return gather_tokens(x, text), gather_tokens(x, image)


def join_sequence(text: Tensor, image: Tensor, num_before: int | Sequence[int]) -> Tensor:
    """Invert :func:`split_sequence`: (B, T, C) and (B, L, C) -> (B, T + L, C)."""
    if not isinstance(num_before, (list, tuple)):
        return torch.cat([text[:, :num_before], image, text[:, num_before:]], dim=1)
    places = _places(text.shape[1], image.shape[1], num_before, image.device)
    return gather_tokens(torch.cat([text, image], dim=1), torch.cat(places, dim=1).argsort(dim=1))


def _places(
    num_text_tokens: int, length: int, num_before: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where (B, T) text and (B, L) image tokens are in the joint sequence."""
    first = torch.tensor(num_before, device=device)[:, None]
    text = torch.arange(num_text_tokens, device=device)
    return text + length * (text >= first), first + torch.arange(length, device=device)
