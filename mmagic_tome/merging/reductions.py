# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Index plans whose slots hold something else than the average of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import IndexPlan, MergePlan, check_shape, entry_indices, flat_rows


class PrunedPlan(IndexPlan):
    """Token pruning: every slot holds its representative as it is, the other tokens are dropped.

    Merging is one row gather. Nothing is summed, so nothing has to be sorted.

    Args:
        slot, num_slots, destinations: see :class:`~.plan.IndexPlan`.
    """

    __slots__ = ("_kept",)

    def __init__(self, slot: Tensor, num_slots: int, destinations: Tensor | None = None) -> None:
        super().__init__(slot, num_slots, destinations)
        self._kept = flat_rows(self._representative(), self.num_tokens)
        self._destinations = None  # contained in the line above

    @property
    def representative(self) -> Tensor:
        """(B, M) int64, the tokens kept."""
        return entry_indices(self._kept, (self.batch, self.num_slots), self.num_tokens)

    def merge(self, x: Tensor) -> Tensor:
        """Gather the representatives.

        Args:
            x (Tensor): (B, N, C), any dtype.

        Returns:
            Tensor: (B, M, C) with ``out[b, m] = x[b, representative[b, m]]``, bit for bit.

        Raises:
            ValueError: shape of ``x`` does not fit the plan.
        """
        check_shape(x, self.batch, self.num_tokens, "merge")
        out = x.reshape(-1, x.shape[-1]).index_select(0, self._kept)
        return out.view(self.batch, self.num_slots, x.shape[-1])


class MlerpPlan(MergePlan):
    """MLERP: the direction of the average of a slot's tokens, the norm of its longest token.

    ::

        m = mean_i x_i        merge = m / |m| * max_i |x_i|

    The average of several tokens is shorter than the tokens, the more so the less they agree. That
    shifts the distribution a layer was trained on; MLERP restores the norm. A slot of one token
    returns it up to rounding. A slot whose tokens cancel has no direction and stays zero.

    Args:
        slot, num_slots, destinations: see :class:`~.plan.IndexPlan`.

    Source: "Token Fusion" (Kim et al., WACV 2024, arXiv 2312.01026), the section on MLERP.
    """

    __slots__ = ()

    def merge(self, x: Tensor) -> Tensor:
        """Combine the tokens of each slot.

        Args:
            x (Tensor): (B, N, C), any floating dtype. Norms are computed in float32 (float64 for
                float64): those of half-precision tokens may not fit half precision.

        Returns:
            Tensor: (B, M, C), the dtype of ``x``.

        Raises:
            ValueError: shape of ``x`` does not fit the plan.
        """
        mean = super().merge(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        longest = super().merge(norm, "max")
        own = torch.linalg.vector_norm(mean, dim=-1, keepdim=True, dtype=wide)
        # Where the average vanishes a factor would be 0 / 0; zero times any factor stays zero.
        factor = longest / own.clamp_min(torch.finfo(wide).tiny)
        factor = torch.where(own > 0, factor, torch.ones_like(factor))
        return (mean.to(wide) * factor).to(x.dtype)


#: What a slot holds: the plan class of every reduction. All take the same arguments.
REDUCTIONS: dict[str, type[IndexPlan]] = {
    "mean": MergePlan,
    "prune": PrunedPlan,
    "mlerp": MlerpPlan,
}
