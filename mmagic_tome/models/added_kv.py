# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Attention that UNets run on the picture itself: Kandinsky 2.2, DeepFloyd IF, unCLIP in diffusers.

There are no transformer blocks. An ``Attention`` is given the (B, C, h, w) picture, normalises it,
takes queries, keys and values from its places, adds keys and values of the text or the prompt's
picture (``add_k_proj``, ``add_v_proj``), and adds the result to the picture. Merging is between the
norm and the three projections, and ends behind ``to_out``, so that what is added up stays whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block

_WHOLE = "it is an attention that works on the picture itself. Write sites=['attn']"
_KEYS = (
    "queries, keys and values are of the same tokens there. Use sites=['attn'] and a method that "
    "merges queries too, such as 'tome'"
)


def is_added_kv(module: nn.Module) -> bool:
    """Whether a module is such an attention."""
    names = ("add_k_proj", "group_norm", "to_q", "to_out")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def added_kv_block(name: str, attention: nn.Module, downsample: int) -> Block:
    """The attention as a :class:`Block` of one site, ``attn``; it shows its grid itself."""
    own = (attention.to_k, attention.to_v)
    return Block(
        name=name,
        module=attention,
        stack=attention,
        downsample=downsample,
        sites={"attn": [attention.to_q, attention.to_out[-1]]},
        alike={"attn": [module for module in own if module is not None]},
        refused={"attn_kv": _KEYS, "block": _WHOLE, "stack": _WHOLE},
    )


def check_added_kv_call(kwargs: dict[str, Any]) -> None:
    """Raises ToMeError for a mask, which diffusers lengthens to all places of the picture."""
    if kwargs.get("attention_mask") is not None:
        raise ToMeError(
            "an attention with added keys was given an attention_mask, which has no meaning for "
            "merged tokens; call the model without it"
        )
