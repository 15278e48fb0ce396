# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Rotary embeddings and masks for merged tokens.

A rotary table holds a row of cosines and a row of sines (or a row of complex numbers) per token.
A merged token takes the row of its destination (``plan.representative``). Averaging rotations does
not give a rotation: the norm drops below 1 and shrinks the attention logits. Masks are indexed the
same way; they only mask text, so the row of any image token will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ToMeError
from ..merging.joint import joint_plan

# Names of the table among the keyword arguments of blocks and attention.
_NAMES = ("image_rotary_emb", "rotary_emb", "freqs_cis")


def with_merged_rotary(
    plan: Any, args: tuple, kwargs: dict[str, Any], position: int | None = None
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a block or attention with the rotary table, if any, of merged tokens.

    Args:
        position: of the table among the positional arguments. Default None: that of the first
            tuple (of cosines and sines).
    """
    for index, value in enumerate(args):
        if index == position or (position is None and isinstance(value, tuple)):
            return (*args[:index], merge_rotary(value, plan), *args[index + 1 :]), kwargs
    for name in _NAMES:
        if kwargs.get(name) is not None:
            return args, {**kwargs, name: merge_rotary(kwargs[name], plan)}
    return args, kwargs


def merge_rotary(table: Tensor | tuple[Tensor, ...], plan: Any) -> Any:
    """Return the rows of the representatives of merged tokens.

    Args:
        table: complex rows, or a tuple of cosines and sines; each (S, D), (B, S, D) or
            (1, S, 1, D). Where S exceeds the plan's number of tokens, the first rows are those of
            the text, which are kept.
        plan (MergePlan): for B batch entries.

    Returns:
        The same with S' rows; for (S, D) and B > 1, :class:`RotaryRows`.
    """
    if isinstance(table, Tensor):
        return _merged_rows(table, plan)
    return tuple(_merged_rows(part, plan) for part in table)


def merge_mask(mask: Tensor, plan: Any, num_before: int | None = None) -> Tensor:
    """Return a mask over keys, or over queries and keys, for merged tokens.

    Args:
        mask: (B, S), (B, 1, 1, S) or (B, 1, S, S); S exceeds the plan's number of tokens by that
            of the text tokens.
        plan (MergePlan): for B batch entries.
        num_before: how many text tokens precede the image tokens. Default None: all.

    Returns:
        The same with S' in place of S.
    """
    length = mask.shape[-1]
    kept = joint_plan(plan, length, num_before).representative
    square = mask.dim() > 2 and mask.shape[-2] == length
    kept = kept.view(kept.shape[0], *[1] * (mask.dim() - 2), -1)
    mask = torch.take_along_dim(mask, kept, dim=-1)
    return torch.take_along_dim(mask, kept.transpose(-1, -2), dim=-2) if square else mask


class RotaryRows:
    """A rotary table (B, S, D) with different rows per batch entry.

    Attention expects one (S, D) table for the whole batch and adds axes for batch and heads:
    ``table[None, :, None, :]``, ``table[None, None]`` or ``table.unsqueeze(1)``. This object
    supports the same expressions and puts its batch in place of the new first axis.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple) -> Tensor:
        if not isinstance(index, tuple) or index[0] is not None:
            self._refuse(repr(index))
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> Tensor:
        """Return (B, S, 1, D), which broadcasts with (B, S, heads, D) as (S, 1, D) does."""
        if dim != 1:
            self._refuse(f"unsqueeze({dim})")
        return self.rows.unsqueeze(2)

    def _refuse(self, what: str) -> None:
        raise ToMeError(
            f"this attention processor indexes its rotary table by {what}, which is not supported "
            "with merged tokens; use the default processor, or a batch of 1"
        )


def _merged_rows(part: Tensor, plan: Any) -> Tensor | RotaryRows:
    batched = part.dim() > 2
    kept = joint_plan(plan, part.shape[1 if batched else 0]).representative
    if not batched:
        return part[kept[0]] if kept.shape[0] == 1 else RotaryRows(part[kept])
    if part.shape[0] == 1:
        return part[0][kept]
    return torch.take_along_dim(part, kept[..., None], dim=1)
