# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plans that put something else than the average into a slot.

:class:`~.plan.MergePlan` averages. Two published methods do not, and what a slot holds is a
property of the plan (its sites only ever call ``merge(x)``), so each is a plan of its own:

- :class:`PrunedPlan`: the features of one token, the others are dropped (token pruning);
- :class:`MlerpPlan`: the direction of the average at the length of the longest (ToFu).

Unmerging is the same for all: every token gets a copy of its slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import MergePlan, flat_rows, in_entries


class PrunedPlan(MergePlan):
    """Every slot holds one token as it is; the other tokens of the slot are left out.

    Merging is one row gather: nothing is summed, so nothing has to be sorted either.

    Args:
        slot (Tensor): (B, N) int64, the slot whose copy every token gets at unmerging.
        kept (Tensor): (B, M) int64, the token that each slot holds. It should be a token of that
            slot (``slot[b, kept[b, m]] == m``), or unmerging what was merged would not give the
            kept tokens back; the producer's duty, not checked.

    Raises:
        ValueError: ``slot`` is not (B, N) int64, ``kept`` is not (B, M) int64 with 1 <= M <= N.
    """

    __slots__ = ("_kept_row",)

    def __init__(self, slot: Tensor, kept: Tensor) -> None:
        # Not the parent's: it sorts the tokens by slot, for the averages.
        if slot.dim() != 2 or slot.dtype != torch.int64:
            raise ValueError(
                f"slot must be a (B, N) int64 tensor, got {tuple(slot.shape)} {slot.dtype}"
            )
        batch, tokens = slot.shape
        fits = kept.dim() == 2 and kept.dtype == torch.int64 and kept.shape[0] == batch
        if not fits or not 1 <= kept.shape[1] <= tokens:
            raise ValueError(
                f"kept must be a ({batch}, M) int64 tensor with M in [1, {tokens}], got "
                f"{tuple(kept.shape)} {kept.dtype}"
            )
        self.batch, self.num_tokens, self.num_slots = batch, tokens, kept.shape[1]
        self._row = flat_rows(slot, self.num_slots)
        self._kept_row = flat_rows(kept, tokens)

    @property
    def size(self) -> Tensor:
        """(B, M) int64, how many tokens get a copy of each slot; every row sums to N."""
        device = self._row.device
        size = torch.zeros(self.batch * self.num_slots, dtype=torch.int64, device=device)
        size.index_add_(0, self._row, torch.ones_like(self._row, dtype=torch.int64))
        return size.view(self.batch, self.num_slots)

    @property
    def kept(self) -> Tensor:
        """(B, M) int64, the token that each slot holds."""
        return in_entries(self._kept_row, (self.batch, self.num_slots), self.num_tokens)

    @property
    def representative(self) -> Tensor:
        """(B, M) int64, the kept tokens."""
        return self.kept

    def merge(self, x: Tensor) -> Tensor:
        """The kept tokens.

        Args:
            x (Tensor): (B, N, C), any dtype.

        Returns:
            Tensor: (B, M, C) with ``out[b, m] = x[b, kept[b, m]]``, to the bit.

        Raises:
            ValueError: shape of ``x`` does not fit the plan.
        """
        self._check(x, self.num_tokens, "merge")
        out = x.reshape(-1, x.shape[-1]).index_select(0, self._kept_row)
        return out.view(self.batch, self.num_slots, x.shape[-1])


class MlerpPlan(MergePlan):
    """MLERP: the direction of the average of a slot's tokens, the length of its longest token.

    ::

        m = mean_i x_i        merge = m / |m| * max_i |x_i|

    The average of several tokens is shorter than the tokens are (the less they agree, the
    shorter), which shifts the distribution that a layer was trained on; this restores the length.

    A slot of one token holds it up to rounding. A slot whose tokens cancel has no direction and
    stays zero.

    Args:
        slot (Tensor): (B, N) int64, see :class:`~.plan.MergePlan`.
        num_slots (int): M.
        centres (Tensor | None): see there.

    Source: "Token Fusion" (Kim et al., WACV 2024, arXiv 2312.01026), the section on MLERP.
    """

    __slots__ = ()

    def merge(self, x: Tensor) -> Tensor:
        """Combine the tokens of each slot.

        Args:
            x (Tensor): (B, N, C), any floating dtype. Lengths are computed in float32 (float64
                for float64): those of half-precision tokens may not fit half precision.

        Returns:
            Tensor: (B, M, C), the dtype of ``x``.

        Raises:
            ValueError: shape of ``x`` does not fit the plan.
        """
        mean = super().merge(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        longest = F.embedding_bag(
            self._order, length.reshape(-1, 1), self._offset, mode="max"
        ).view(self.batch, self.num_slots, 1)
        own = torch.linalg.vector_norm(mean, dim=-1, keepdim=True, dtype=wide)
        # Where the average vanishes a factor would be 0 / 0; zero times any factor stays zero.
        factor = longest / own.clamp_min(torch.finfo(wide).tiny)
        factor = torch.where(own > 0, factor, torch.ones_like(factor))
        return (mean.to(wide) * factor).to(x.dtype)
