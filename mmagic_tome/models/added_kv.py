# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNet attention over image-shaped tensors: Kandinsky 2.2, DeepFloyd IF, unCLIP in diffusers.

There are no transformer blocks. An ``Attention`` receives the (B, C, h, w) activations, normalizes
them, projects every position to queries, keys and values, appends keys and values of the text or
image prompt (``add_k_proj``, ``add_v_proj``), and adds its output to the activations. Tokens are
merged between the norm and the three projections and unmerged after ``to_out``, so that the
residual connection keeps all positions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block

_WHOLE = "it is an attention over an image-shaped tensor. Write targets=['attn']"
_KEYS = (
    "queries, keys and values are projected from the same tokens. Use targets=['attn'] and a "
    "method that merges queries too, such as 'tome'"
)


def is_added_kv(module: nn.Module) -> bool:
    """Return whether a module is such an attention."""
    children = module._modules
    return all(map(children.get, ("add_k_proj", "group_norm", "to_q", "to_out")))


def added_kv_block(name: str, attention: nn.Module, downsample: int) -> Block:
    """Return the attention as a :class:`Block` with one target, ``attn``."""
    own = (attention.to_k, attention.to_v)
    return Block(
        name=name,
        module=attention,
        grid_module=attention,
        downsample=downsample,
        targets={"attn": [attention.to_q, attention.to_out[-1]]},
        shared_input={"attn": [module for module in own if module is not None]},
        refused={"attn_kv": _KEYS, "block": _WHOLE, "stack": _WHOLE},
    )


def check_added_kv_call(kwargs: dict[str, Any]) -> None:
    """Raise ToMeError for a mask, which diffusers pads to all positions of the image."""
    if kwargs.get("attention_mask") is not None:
        raise ToMeError(
            "an attention with added keys received an attention_mask, which does not fit merged "
            "tokens; call the model without it"
        )
