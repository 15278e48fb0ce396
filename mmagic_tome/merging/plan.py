# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge plans: which tokens become one. Matching makes them, everything else only applies them."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_MODES = ("mean", "sum", "max")


class Plan(Protocol):
    """Merging of (B, N, C) tokens to (B, M, C), and back.

    ``slot``, ``size`` and ``representative`` have one row per entry of the merged batch. That is
    the batch itself, except where merging joins entries (:class:`~.frames.FramePlan`).

    Attributes:
        batch (int): B.
        num_tokens (int): N, tokens per entry before merging.
        num_slots (int): M, tokens per entry after merging.
        slot (Tensor): (B, N) int64, the slot of every token.
        size (Tensor): (B, M), the number of tokens in every slot; rows sum to N. int64, floating
            where tokens are shared out over several slots.
        representative (Tensor): (B, M) int64, the token whose position represents each slot.
    """

    @property
    def batch(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def slot(self) -> Tensor: ...

    @property
    def size(self) -> Tensor: ...

    @property
    def representative(self) -> Tensor: ...

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, C), the dtype of ``x``; ValueError if its shape does not fit."""
        ...

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, M, C) -> (B, N, C), the dtype of ``y``; ValueError if its shape does not fit."""
        ...


class IndexPlan:
    """Plan in which every token belongs to one slot; subclasses implement ``merge``.

    Args:
        slot (Tensor): (B, N) int64, the slot of every token, in ``[0, num_slots)``. Every slot
            must hold at least one token; this is not checked, since a check would synchronize
            with the device.
        num_slots (int): M.
        destinations (Tensor | None): (D,) or (B, D) int64, tokens that represent their slots, at
            most one of each slot. Slots without one are represented by their first token.
            Default None: all of them.

    Raises:
        ValueError: ``slot`` is not (B, N) int64, or ``num_slots`` is not in [1, N].
    """

    __slots__ = ("_destinations", "_row", "batch", "num_slots", "num_tokens")

    def __init__(self, slot: Tensor, num_slots: int, destinations: Tensor | None = None) -> None:
        if slot.dim() != 2 or slot.dtype != torch.int64:
            raise ValueError(
                f"slot must be a (B, N) int64 tensor, got {tuple(slot.shape)} {slot.dtype}"
            )
        batch, tokens = slot.shape
        if not 1 <= num_slots <= tokens:
            raise ValueError(f"num_slots must be in [1, N={tokens}], got {num_slots}")
        self.batch, self.num_tokens, self.num_slots = batch, tokens, num_slots
        self._destinations = destinations
        self._row = flat_rows(slot, num_slots)

    @property
    def slot(self) -> Tensor:
        """(B, N) int64, the slot of every token."""
        # Computed on request: plans may be kept for several steps, and this is twice their rows.
        return entry_indices(self._row, (self.batch, self.num_tokens), self.num_slots)

    @property
    def size(self) -> Tensor:
        """(B, M) int64, the number of tokens in each slot; every row sums to N."""
        size = self._row.new_zeros(self.batch * self.num_slots, dtype=torch.int64)
        size.index_add_(0, self._row, torch.ones_like(self._row, dtype=torch.int64))
        return size.view(self.batch, self.num_slots)

    @property
    def representative(self) -> Tensor:
        """(B, M) int64: the destination of each slot, or its first token."""
        return self._representative()

    def _representative(self) -> Tensor:
        slot = self.slot
        token = torch.arange(self.num_tokens, device=slot.device).expand(self.batch, -1)
        first = token.new_zeros(self.batch, self.num_slots)
        first = first.scatter_reduce(1, slot, token, "amin", include_self=False)
        if self._destinations is None:
            return first
        destinations = self._destinations.expand(self.batch, -1)
        return first.scatter(1, slot.gather(1, destinations), destinations)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy every slot back to all of its tokens.

        Args:
            y (Tensor): (B, M, C).

        Returns:
            Tensor: (B, N, C) with ``out[b, n] = y[b, slot[b, n]]``.

        Raises:
            ValueError: shape of ``y`` does not fit the plan.
        """
        check_shape(y, self.batch, self.num_slots, "unmerge")
        # torch sums half-precision gradients on a CPU in single precision only with int64.
        row = self._row.long() if y.requires_grad and torch.is_grad_enabled() else self._row
        out = y.reshape(-1, y.shape[-1]).index_select(0, row)
        return out.view(self.batch, self.num_tokens, y.shape[-1])

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(batch={self.batch}, {self.num_tokens} -> {self.num_slots} tokens)"


class MergePlan(IndexPlan):
    """Every slot is the average of its tokens.

    Merging is one kernel (``embedding_bag``): it gathers rows in slot order and averages runs of
    them. Without a zero-filled buffer, a scatter or atomic additions it returns the same bits on
    every run, also on a GPU, where a scattered sum has no fixed order. Both directions are
    differentiable, merging once only: ``embedding_bag`` has no second derivative.

    Args:
        slot, num_slots, destinations: see :class:`IndexPlan`.

    Source: ToMe (arXiv 2210.09461, section 3.1); with unmerging, for diffusion, arXiv 2303.17604,
    section 3.
    """

    __slots__ = ("_offset", "_order")

    def __init__(self, slot: Tensor, num_slots: int, destinations: Tensor | None = None) -> None:
        super().__init__(slot, num_slots, destinations)
        kind = self._row.dtype
        sorted_row, order = torch.sort(self._row, stable=True)
        self._order = order.to(kind)
        slots = torch.arange(self.batch * num_slots, device=slot.device, dtype=kind)
        self._offset = torch.searchsorted(sorted_row, slots, out_int32=kind == torch.int32)

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Combine the tokens of each slot.

        Args:
            x (Tensor): (B, N, C), any floating dtype.
            mode (str): ``'mean'`` (default), ``'sum'`` or ``'max'``.

        Returns:
            Tensor: (B, M, C), the dtype of ``x``.

        Raises:
            ValueError: shape of ``x`` does not fit the plan, or an unknown mode.
        """
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
        check_shape(x, self.batch, self.num_tokens, "merge")
        rows = x.reshape(-1, x.shape[-1])
        merged = F.embedding_bag(self._order, rows, self._offset, mode=mode)
        return merged.view(self.batch, self.num_slots, x.shape[-1])


def check_shape(x: Tensor, batch: int, length: int, what: str) -> None:
    """Raise ValueError unless ``x`` is (batch, length, C)."""
    if x.dim() != 3 or x.shape[0] != batch or x.shape[1] != length:
        raise ValueError(
            f"{what} expects ({batch}, {length}, C) for this plan, got {tuple(x.shape)}"
        )


def flat_rows(index: Tensor, width: int) -> Tensor:
    """Convert indices into each batch entry to row numbers of the flattened batch.

    One index then serves the whole batch. int32 where it can count the rows: half the memory.

    Args:
        index (Tensor): (B, K) int64, values in ``[0, width)``.
        width (int): rows of one entry.

    Returns:
        Tensor: (B * K,) int32 or int64.
    """
    batch = index.shape[0]
    kind = torch.int32 if batch * max(width, index.shape[1]) < 2**31 else torch.int64
    entry = torch.arange(batch, device=index.device)[:, None]
    return (index + entry * width).reshape(-1).to(kind)


def entry_indices(rows: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """Invert :func:`flat_rows`: (B * K,) -> (B, K) int64, ``shape`` is (B, K)."""
    entry = torch.arange(shape[0], device=rows.device)[:, None]
    return rows.view(shape) - entry * width
