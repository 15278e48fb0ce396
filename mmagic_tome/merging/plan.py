# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A merge plan: the one data structure that matching produces and everything else consumes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MODES = ("mean", "sum", "max")


class MergePlan:
    """Assignment of N tokens to M <= N slots, the same counts for every batch entry.

    Both directions are differentiable, merging once only (``embedding_bag`` has no second
    derivative).

    Merging puts into every slot the average of its tokens (ToMe, arXiv
    2210.09461, section 3.1; for diffusion arXiv 2303.17604, section 3);
    unmerging copies every slot back to all of its tokens.

    Both directions are a single kernel. Unmerging gathers rows by an inverse
    index. Merging gathers rows in slot order and averages runs of them
    (``embedding_bag``): no zero-filled buffer, no scatter, no atomic addition,
    hence the same bits on every run also on a GPU, where a scattered sum has
    no fixed order.

    Args:
        slot (Tensor): (B, N) int64, the slot of every token, each value in
            ``[0, num_slots)``. Every slot must hold at least one token; this is
            the producer's duty and not checked (a check would wait for the
            device), an empty slot merges to zeros.
        num_slots (int): M, the number of slots per batch entry.
        centres (Tensor | None): (D,) or (B, D) int64, the tokens that the first D slots grew
            around, see :attr:`representative`. Default None: not known.

    Attributes:
        batch (int): B, the number of batch entries the plan was made for.
        num_tokens (int): N, the number of tokens before merging.
        num_slots (int): M, after it.

    Raises:
        ValueError: ``slot`` is not (B, N) int64 or ``num_slots`` is not in [1, N].
    """

    __slots__ = ("_centres", "_offset", "_order", "_row", "batch", "num_slots", "num_tokens")

    def __init__(self, slot: Tensor, num_slots: int, centres: Tensor | None = None) -> None:
        if slot.dim() != 2 or slot.dtype != torch.int64:
            raise ValueError(
                f"slot must be a (B, N) int64 tensor, got {tuple(slot.shape)} {slot.dtype}"
            )
        batch, tokens = slot.shape
        if not 1 <= num_slots <= tokens:
            raise ValueError(f"num_slots must be in [1, N={tokens}], got {num_slots}")
        self.batch, self.num_tokens, self.num_slots = batch, tokens, num_slots
        self._centres = centres
        self._row = flat_rows(slot, num_slots)
        kind = self._row.dtype
        sorted_row, order = torch.sort(self._row, stable=True)
        self._order = order.to(kind)
        slots = torch.arange(batch * num_slots, device=slot.device, dtype=kind)
        self._offset = torch.searchsorted(sorted_row, slots, out_int32=kind == torch.int32)

    @property
    def slot(self) -> Tensor:
        """(B, N) int64, the slot of every token."""
        # Plans of all sites may be kept for steps: this is computed for who asks.
        return in_entries(self._row, (self.batch, self.num_tokens), self.num_slots)

    @property
    def size(self) -> Tensor:
        """(B, M) int64, how many tokens each slot holds; every row sums to N."""
        end = torch.full_like(self._offset[:1], self._row.shape[0])
        return torch.diff(self._offset, append=end).view(self.batch, self.num_slots).long()

    @property
    def representative(self) -> Tensor:
        """(B, M) int64: one token of every slot, whose place in the picture stands for it.

        The slot's destination, which all of its tokens resemble; the slot's first token where
        the plan knows of no destinations.
        """
        first = self._order.index_select(0, self._offset).long() % self.num_tokens
        first = first.view(self.batch, self.num_slots)
        if self._centres is None:
            return first
        centres = self._centres.expand(self.batch, -1)
        return torch.cat([centres, first[:, centres.shape[1] :]], dim=1)

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
        self._check(x, self.num_tokens, "merge")
        rows = x.reshape(-1, x.shape[-1])
        merged = F.embedding_bag(self._order, rows, self._offset, mode=mode)
        return merged.view(self.batch, self.num_slots, x.shape[-1])

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy every slot back to all of its tokens.

        Args:
            y (Tensor): (B, M, C).

        Returns:
            Tensor: (B, N, C) with ``out[b, n] = y[b, slot[b, n]]``.

        Raises:
            ValueError: shape of ``y`` does not fit the plan.
        """
        self._check(y, self.num_slots, "unmerge")
        # torch sums half-precision gradients on a CPU in single precision only with int64.
        row = self._row.long() if y.requires_grad and torch.is_grad_enabled() else self._row
        out = y.reshape(-1, y.shape[-1]).index_select(0, row)
        return out.view(self.batch, self.num_tokens, y.shape[-1])

    def _check(self, x: Tensor, length: int, what: str) -> None:
        if x.dim() != 3 or x.shape[0] != self.batch or x.shape[1] != length:
            raise ValueError(
                f"{what} expects ({self.batch}, {length}, C) for this plan, got {tuple(x.shape)}"
            )

    def __repr__(self) -> str:
        return f"MergePlan(batch={self.batch}, {self.num_tokens} -> {self.num_slots} tokens)"


def flat_rows(index: Tensor, width: int) -> Tensor:
    """Indices into each batch entry as row numbers of the flattened batch.

    One index serves the whole batch then. int32 where that can count the rows: half the memory of
    what a plan keeps.

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


def in_entries(rows: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """What :func:`flat_rows` was given, (B, K) int64: ``shape`` is (B, K)."""
    entry = torch.arange(shape[0], device=rows.device)[:, None]
    return rows.view(shape) - entry * width
