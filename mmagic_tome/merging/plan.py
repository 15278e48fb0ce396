# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merge plans: which tokens become one. Matching makes them, everything else only applies them."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(Protocol):
    """Merging of (B, N, C) tokens to (B, M, C), and back.

    ``slot``, ``size`` and ``representative`` have one row per entry of the merged batch. That is
    the batch itself, except where merging joins entries (:class:`~.frames.FramePlan`).

    Attributes:
        batch (int): B.
        num_tokens (int): N, tokens per entry before merging.
        num_slots (int): M, tokens per entry after merging.
        slot (Tensor): (B, N) int64, the slot of every token.
        size (Tensor): (B, M) int64, the number of tokens in every slot; rows sum to N.
        representative (Tensor): (B, M) int64, the token whose position represents each slot.
    """

    batch: int
    num_tokens: int
    num_slots: int
    slot: Tensor
    size: Tensor
    representative: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, C), the dtype of ``x``; ValueError if its shape does not fit."""

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, M, C) -> (B, N, C), the dtype of ``y``; ValueError if its shape does not fit."""


class IndexPlan:
    """Plan in which every token belongs to one slot; subclasses implement ``merge``.

    Args:
        slot (Tensor): (B, N) int64, the slot of every token, in ``[0, num_slots)``. Every slot
            must hold at least one token; a check would synchronize with the device.
        num_slots (int): M, in [1, N].
        destinations (Tensor | None): (D,) or (B, D) int64, tokens that represent their slots, at
            most one of each slot; the others are represented by their first token.
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
        # Computed on request: plans may be kept for several steps, and this is twice their rows.
        return entry_indices(self._row, (self.batch, self.num_tokens), self.num_slots)

    @property
    def size(self) -> Tensor:
        size = self._row.new_zeros(self.batch * self.num_slots, dtype=torch.int64)
        size.index_add_(0, self._row, torch.ones_like(self._row, dtype=torch.int64))
        return size.view(self.batch, self.num_slots)

    @property
    def representative(self) -> Tensor:
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
        """Copy every slot to all of its tokens: ``out[b, n] = y[b, slot[b, n]]``."""
        check_shape(y, self.batch, self.num_slots, "unmerge")
        # torch sums half-precision gradients on a CPU in single precision only with int64.
        row = self._row.long() if y.requires_grad and torch.is_grad_enabled() else self._row
        out = y.reshape(-1, y.shape[-1]).index_select(0, row)
        return out.view(self.batch, self.num_tokens, y.shape[-1])

    def __repr__(self) -> str:
        numbers = f"batch={self.batch}, {self.num_tokens} -> {self.num_slots} tokens"
        return f"{type(self).__name__}({numbers})"


class MergePlan(IndexPlan):
    """Every slot is the average of its tokens.

    Merging is one kernel (``embedding_bag``): it gathers rows in slot order and averages runs of
    them, and returns the same bits on every run, also on a GPU, where a scattered sum has no fixed
    order. It has no second derivative.

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
        """Combine the tokens of each slot; ``mode`` is 'mean' (default), 'sum' or 'max'."""
        check_shape(x, self.batch, self.num_tokens, "merge")
        rows = x.reshape(-1, x.shape[-1])
        merged = F.embedding_bag(self._order, rows, self._offset, mode=mode)
        return merged.view(self.batch, self.num_slots, x.shape[-1])


class PrunedPlan(IndexPlan):
    """Token pruning: every slot holds its representative as it is, the other tokens are dropped."""

    __slots__ = ("_kept",)

    def __init__(self, slot: Tensor, num_slots: int, destinations: Tensor | None = None) -> None:
        super().__init__(slot, num_slots, destinations)
        self._kept = flat_rows(self._representative(), self.num_tokens)
        self._destinations = None  # contained in the line above

    @property
    def representative(self) -> Tensor:
        return entry_indices(self._kept, (self.batch, self.num_slots), self.num_tokens)

    def merge(self, x: Tensor) -> Tensor:
        """``out[b, m] = x[b, representative[b, m]]``, bit for bit, of any dtype."""
        check_shape(x, self.batch, self.num_tokens, "merge")
        out = x.reshape(-1, x.shape[-1]).index_select(0, self._kept)
        return out.view(self.batch, self.num_slots, x.shape[-1])


def check_shape(x: Tensor, batch: int, length: int, what: str) -> None:
    """Raise ValueError unless ``x`` is (batch, length, C)."""
    if x.dim() != 3 or x.shape[0] != batch or x.shape[1] != length:
        raise ValueError(
            f"{what} expects ({batch}, {length}, C) for this plan, got {tuple(x.shape)}"
        )


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, K, C) of (B, N, C) by their (B, K) int64 indices."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def flat_rows(index: Tensor, width: int) -> Tensor:
    """Convert (B, K) int64 indices below ``width`` to (B * K,) rows of the flattened batch.

    int32 where it can count the rows, half the memory; otherwise int64.
    """
    batch = index.shape[0]
    kind = torch.int32 if batch * max(width, index.shape[1]) < 2**31 else torch.int64
    entry = torch.arange(batch, device=index.device)[:, None]
    return (index + entry * width).reshape(-1).to(kind)


def entry_indices(rows: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """Invert :func:`flat_rows`: (B * K,) -> (B, K) int64, ``shape`` is (B, K)."""
    entry = torch.arange(shape[0], device=rows.device)[:, None]
    return rows.view(shape) - entry * width
