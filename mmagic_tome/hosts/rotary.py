# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Rotary embeddings follow the tokens that stay.

Where positions are not part of the tokens, they turn queries and keys inside attention, by a table
of a cosine and a sine row for every token. A merged token gets the rows of the one that stands for
it (``plan.representative``: its destination), not the average of all: an average of rotations is
none, it is shorter than 1 and would weaken every product with that token by how far apart its
tokens lie.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ToMeError
from ..merging.prefix import PrefixedPlan

# Attention is given the table by name; blocks too, except under gradient checkpointing (Wan's
# always by position), and there it is the fourth argument in every family.
_NAMES = ("image_rotary_emb", "rotary_emb")
_POSITION = 3


def with_merged_rotary(
    plan: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a block or attention with the table, if there is one, for merged tokens.

    For :meth:`.base.Host.adapt`, with its arguments and result.
    """
    if len(args) > _POSITION and args[_POSITION] is not None:
        table = merge_rotary(args[_POSITION], plan)
        return (*args[:_POSITION], table, *args[_POSITION + 1 :]), kwargs
    for name in _NAMES:
        if kwargs.get(name) is not None:
            return args, {**kwargs, name: merge_rotary(kwargs[name], plan)}
    return args, kwargs


class RotaryRows:
    """A rotary table (B, S, D) with other rows for every entry of the batch.

    Attention expects one (S, D) table for the whole batch and gives it an axis for the batch and
    one for the heads by indexing: ``table[None, :, None, :]`` or ``table[None, None]``. This
    object has its batch in place of the first.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple) -> Tensor:
        if not isinstance(index, tuple) or index[0] is not None:
            raise ToMeError(
                f"this attention processor reads its rotary table by {index!r}, which is not "
                "known to work with merged tokens; use the default processor, or a batch of 1"
            )
        return self.rows[(slice(None), *index[1:])]


def merge_rotary(table: tuple[Tensor, Tensor], plan: Any) -> tuple:
    """The table for merged tokens: the rows of those that stand for them.

    Args:
        table (tuple): cosines and sines, (S, D) each. S may be larger than the number of tokens
            of the plan: then the first ones are the text's, which stay.
        plan (MergePlan): of B entries.

    Returns:
        tuple: cosines and sines; (S', D) tensors for B = 1, else :class:`RotaryRows`. Of a table
        with an axis for the batch, (1, S, 1, D): (B, S', 1, D) tensors.
    """
    if table[0].dim() == 4:
        return tuple(part[0][plan.representative] for part in table)
    text = table[0].shape[0] - plan.num_tokens
    if text:
        plan = PrefixedPlan(plan, text)
    kept = plan.representative
    if plan.batch == 1:
        return tuple(part[kept[0]] for part in table)
    return tuple(RotaryRows(part[kept]) for part in table)
