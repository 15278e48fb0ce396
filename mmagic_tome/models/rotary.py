# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Rotary embeddings, and masks, follow the tokens that stay.

Where positions are not part of the tokens, they turn queries and keys inside attention, by a table
of a cosine and a sine row for every token (or of complex rows). A merged token gets the rows of
the one that stands for it (``plan.representative``: its destination), not the average of all: an
average of rotations is none, it is shorter than 1 and would weaken every product with that token
by how far apart its tokens lie. So does a mask, which leaves out text: all tokens of the picture
are alike to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ToMeError
from ..merging.joint import joint_plan

# What attention, and blocks that are called by name, call the table.
_NAMES = ("image_rotary_emb", "rotary_emb", "freqs_cis")


def with_merged_rotary(
    plan: Any, args: tuple, kwargs: dict[str, Any], position: int | None = None
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a block or attention with the table, if there is one, for merged tokens.

    For :meth:`.base.Host.adapt`, with its arguments and result.

    Args:
        position (int | None): of the table among the positional arguments of a block. Default
            None: the one that is a tuple (of cosines and sines).
    """
    if position is None:
        position = next((i for i, value in enumerate(args) if isinstance(value, tuple)), None)
    if position is not None and len(args) > position and args[position] is not None:
        table = merge_rotary(args[position], plan)
        return (*args[:position], table, *args[position + 1 :]), kwargs
    for name in _NAMES:
        if kwargs.get(name) is not None:
            return args, {**kwargs, name: merge_rotary(kwargs[name], plan)}
    return args, kwargs


def merge_rotary(table: Tensor | tuple[Tensor, ...], plan: Any) -> Any:
    """The table for merged tokens: the rows of those that stand for them.

    Args:
        table: a tensor of complex rows, or a tuple of cosines and sines; each (S, D), or with an
            axis for the batch (B, S, D) or (1, S, 1, D). S may be larger than the number of tokens
            of the plan: then the first ones are the text's, which stay.
        plan (MergePlan): of B entries.

    Returns:
        The same of S' rows. For (S, D) and B > 1, :class:`RotaryRows`.
    """
    if isinstance(table, Tensor):
        return _merged_rows(table, plan)
    return tuple(_merged_rows(part, plan) for part in table)


def merge_mask(mask: Tensor, plan: Any, before: int | None = None) -> Tensor:
    """A mask over keys, or over queries and keys, for merged tokens.

    Args:
        mask (Tensor): (B, S), (B, 1, 1, S) or (B, 1, S, S); S may be larger than the number of
            tokens of the plan by those of the text.
        plan (MergePlan): of B entries.
        before (int | None): how many tokens of the text are in front. Default None: all.

    Returns:
        Tensor: the same with S' in place of S.
    """
    length = mask.shape[-1]
    kept = joint_plan(plan, length, before).representative
    square = mask.dim() > 2 and mask.shape[-2] == length
    kept = kept.view(kept.shape[0], *[1] * (mask.dim() - 2), -1)
    mask = torch.take_along_dim(mask, kept, dim=-1)
    return torch.take_along_dim(mask, kept.transpose(-1, -2), dim=-2) if square else mask


class RotaryRows:
    """A rotary table (B, S, D) with other rows for every entry of the batch.

    Attention expects one (S, D) table for the whole batch and gives it an axis for the batch and
    one for the heads: ``table[None, :, None, :]``, ``table[None, None]`` or
    ``table.unsqueeze(1)``. This object has its batch in place of the first.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple) -> Tensor:
        if not isinstance(index, tuple) or index[0] is not None:
            self._refuse(repr(index))
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> Tensor:
        """(B, S, 1, D), which fits (B, S, heads, D) as (S, 1, D) does."""
        if dim != 1:
            self._refuse(f"unsqueeze({dim})")
        return self.rows.unsqueeze(2)

    def _refuse(self, what: str) -> None:
        raise ToMeError(
            f"this attention processor reads its rotary table by {what}, which is not known to "
            "work with merged tokens; use the default processor, or a batch of 1"
        )


def _merged_rows(part: Tensor, plan: Any) -> Tensor | RotaryRows:
    batched = part.dim() > 2
    kept = joint_plan(plan, part.shape[1 if batched else 0]).representative
    if not batched:
        return part[kept[0]] if kept.shape[0] == 1 else RotaryRows(part[kept])
    if part.shape[0] == 1:
        return part[0][kept]
    return torch.take_along_dim(part, kept[..., None], dim=1)
