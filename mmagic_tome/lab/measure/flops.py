# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Floating-point operations of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], Any]) -> int:
    """Return the operations of a call, one multiply-add counting two.

    Matrix products, convolutions and attention count (``torch.utils.flop_counter``), the products
    by which merging finds similar tokens included, in 8 bits too. By convention, element-wise work,
    normalization, gathering and averaging do not.

    Args:
        function: Called once, without gradients. Compiled code cannot be counted.
    """
    return count_flops_of(None, function)[0]


def count_flops_of(part: nn.Module | None, function: Callable[[], Any]) -> tuple[int, int]:
    """Return the operations of a call, and of these the operations of one module.

    Args:
        part: A module that ``function`` calls any number of times, but not within itself. None:
            its share is 0.
        function: See :func:`count_flops`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    starts: list[int] = []
    spans: list[int] = []
    hooks = []
    if part is not None:
        # Outermost, so that merging around the module counts as a part of it.
        hooks = [
            part.register_forward_pre_hook(
                lambda *_: starts.append(counter.get_total_flops()), prepend=True
            ),
            part.register_forward_hook(
                lambda *_: spans.append(counter.get_total_flops() - starts.pop())
            ),
        ]
    try:
        with counter, torch.no_grad():
            function()
    finally:
        for hook in hooks:
            hook.remove()
    return int(counter.get_total_flops()), int(sum(spans))


def _attention(query, key, value, *args, out_shape=None, **kwargs):
    """Two products of every query with every key, of shapes (B, heads, tokens, width)."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


def _product(left, right, *args, out_shape=None, **kwargs):
    """Of shapes (n, k) and (k, m)."""
    return 2 * left[0] * left[1] * right[1]


# What torch's counter does not know: its own attention kernel for the CPU; the 8-bit product by
# which merging finds similar tokens where the CPU is fast at it, as much work as in floating point.
_MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._int_mm: _product,
}
