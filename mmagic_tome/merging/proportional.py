# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Proportional attention: softmax(Q K^T / sqrt(d) + log s) V, where s is the number of tokens that
a key represents (ToMe, arXiv 2210.09461, section 3).

``log s`` can reach ``scaled_dot_product_attention`` in two ways:

- as an additive mask. The flash kernels of GPUs take none, so a slower kernel runs;
- as further channels of queries and keys (:func:`attention_with_channels`): the query's value times
  the key's adds ``log s`` to the scaled product. No mask is left, so the flash kernel runs.

:func:`prefers_channels` chooses per call. Attention that takes a mask receives one, so that it is
exact with any implementation. Inside of :class:`~.keys.AttentionKeys` a call of
``scaled_dot_product_attention`` exchanges this mask for channels, or gets what it lacks where
attention takes no mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest head size of the flash kernels; they take multiples of this many channels.
_WIDEST, _MULTIPLE = 256, 8


def log_sizes(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of the sizes (B, M) of keys, in ``dtype`` but at least in single precision."""
    return size.to(torch.promote_types(dtype, torch.float32)).log()


def prefers_channels(query: Tensor) -> bool:
    """Return whether a mask would cost queries (B, H, N, d) the flash kernel: on a GPU that has one
    (compute capability 8 or newer), in half precision, with a head size that it takes.

    On a CPU a mask costs little, and on short sequences less than the copies that channels need
    (``docs/explanation/proportional_attention.md``).
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    fits = query.dim() == 4 and _width(query.shape[-1]) <= _WIDEST
    return fits and torch.cuda.get_device_properties(query.device).major >= 8


def attention_with_channels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_size: Tensor,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """``scaled_dot_product_attention`` with ``log s`` added to the scores of keys, without a mask.

    The query's further channel would be sqrt(d) and the key's log s: scaled by 1 / sqrt(d), their
    product is log s. Half precision rounds both. So the query's is a power of two near sqrt(d), the
    key's makes up for the difference, and what rounding it loses is in a second channel. Sums of
    products are taken in single precision, as in any kernel. The head size is padded with zeros to
    a multiple of 8.

    Args:
        query: (B, H, N, d).
        key: (B, H, M, d).
        value: (B, H, M, e).
        log_size: (B, M) or (1, M), see :func:`log_sizes`.
        scale: Of the products. Default: 1 / sqrt(d), of the head size without further channels.
        **options: Of ``scaled_dot_product_attention``.

    Returns:
        Tensor: (B, H, N, e).
    """
    width, of_values = query.shape[-1], value.shape[-1]
    scale = width**-0.5 if scale is None else scale
    more = _width(max(width, of_values - 2)) - width  # values may be wider
    unit = 2.0 ** round(-math.log2(scale))
    weight = (log_size / (scale * unit))[:, None, :, None]
    high = weight.to(key.dtype)
    low = (weight - high).to(key.dtype)
    of_keys = F.pad(torch.cat([high, low], dim=-1), (0, more - 2))
    of_queries = F.pad(query.new_full((1, 1, 1, 2), unit), (0, more - 2))
    out = F.scaled_dot_product_attention(
        torch.cat([query, of_queries.expand(*query.shape[:-1], more)], dim=-1),
        torch.cat([key, of_keys.expand(*key.shape[:-1], more)], dim=-1),
        F.pad(value, (0, width + more - of_values)),
        scale=scale,
        **options,
    )
    return out[..., :of_values]


def _width(head_size: int) -> int:
    """The head size with two further channels, padded."""
    return -(-(head_size + 2) // _MULTIPLE) * _MULTIPLE
