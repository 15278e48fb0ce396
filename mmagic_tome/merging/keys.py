# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Merging inside of attention: its keys and values, and the weights of merged keys.

Where attention takes the tokens of keys and values as an argument, merged tokens are passed to it.
Elsewhere, as in joint attention of image and text or with rotary embeddings, keys and values are
merged after projection and rotation, in the call of ``scaled_dot_product_attention``. Projection is
linear, so without rotation both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import proportional
from .joint import joint_plan
from .plan import Plan

_ATTENTION = torch._C._nn.scaled_dot_product_attention


class AttentionKeys(TorchFunctionMode):
    """Merges and weighs the keys of the next call of ``scaled_dot_product_attention`` inside of it.
    That concerns the calls of one thread, and replaces nothing.

    Args:
        image_last: Whether the image's keys follow all others, such as those of a text. Default
            False: they precede them.

    Attributes:
        plan: What to merge keys and values by; the call takes it away. Default None: they come
            merged, or are not to be.
        log_size: :func:`~.proportional.log_sizes` of the merged keys of the image, (B, M); the call
            takes it away. Default None: there is nothing to weigh.
        masked: Whether the attention receives a mask that adds ``log_size``. Default False.
    """

    def __init__(self, image_last: bool = False) -> None:
        super().__init__()
        self.image_last = image_last
        self.plan: Plan | None = None
        self.log_size: Tensor | None = None
        self.masked = False

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # written in Python, in a way that dynamo cannot trace
            return args[0].unflatten(*args[1:], **kwargs)
        wanted = self.plan is not None or self.log_size is not None
        # Others may have wrapped torch's function, and call the original.
        if wanted and (func is F.scaled_dot_product_attention or func is _ATTENTION):
            return self.attention(func, *args, **kwargs)
        return func(*args, **kwargs)

    def attention(
        self,
        function: Callable,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """``function``, torch's or another's in its place, with the image's keys and values merged
        and ``log_size`` added to their scores; ValueError if they do not fit the plan."""
        plan, log_size = self.plan, self.log_size
        self.plan = self.log_size = None
        options.update(dropout_p=dropout_p, is_causal=is_causal)
        if plan is not None:
            plan = self._whole(plan, key, is_causal)
            key, value = merge_heads(plan, key), merge_heads(plan, value)
            if attn_mask is not None:
                attn_mask = _of_merged(attn_mask, plan)
        if log_size is None:
            return function(query, key, value, attn_mask=attn_mask, **options)
        others = key.shape[-2] - log_size.shape[-1]
        log_size = F.pad(log_size, (others, 0) if self.image_last else (0, others))
        own = attn_mask is not None and not self.masked  # a mask of the model itself
        if proportional.prefers_channels(query) and not own:
            return proportional.attention_with_channels(query, key, value, log_size, **options)
        if attn_mask is None or own:
            mask = log_size.to(query.dtype)[:, None, None]
            if own and attn_mask.dtype == torch.bool:
                mask = mask.masked_fill(~attn_mask, -math.inf)
            elif own:
                mask = mask + attn_mask
            attn_mask = mask
        return function(query, key, value, attn_mask=attn_mask, **options)

    def _whole(self, plan: Plan, key: Tensor, is_causal: bool) -> Plan:
        """A plan of all keys, from that of the image's."""
        others = key.shape[-2] - plan.num_tokens
        if key.dim() != 4 or key.shape[0] != plan.batch or others < 0 or is_causal:
            found = f"keys {tuple(key.shape)}" + (", of causal attention" if is_causal else "")
            raise ValueError(
                f"an attention has {found}, which a plan for {plan.batch} x {plan.num_tokens} "
                "tokens cannot merge; write targets=['attn']"
            )
        return joint_plan(plan, key.shape[-2], others if self.image_last else 0)


def merge_heads(plan: Plan, x: Tensor) -> Tensor:
    """Keys or values (B, H, S, d) of all heads merged: (B, H, S', d)."""
    heads, width = x.shape[1], x.shape[-1]
    merged = plan.merge(x.transpose(1, 2).flatten(2))
    return merged.unflatten(2, (heads, width)).transpose(1, 2)


def _of_merged(mask: Tensor, plan: Plan) -> Tensor:
    """A mask (..., S), which broadcasts to (B, H, L, S), for merged keys: (B, ..., S')."""
    if mask.shape[-1] == 1:
        return mask
    mask = mask[(None,) * (4 - mask.dim())]
    return torch.take_along_dim(mask, plan.representative[:, None, None], dim=-1)
