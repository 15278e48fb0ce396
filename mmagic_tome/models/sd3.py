# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Stable Diffusion 3 and 3.5 in diffusers: two streams with joint attention.

A block receives image tokens (``hidden_states``) and text tokens (``encoder_hidden_states``) and
returns (text, image); its attention returns (image, text). Only image tokens are merged. Positions
are added to the tokens once, before the first block.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .base import Block, blocks_of
from .dit import PatchTransformer

# For blocks with two streams, here and in other families.
REFUSED = {
    "attn_kv": (
        "joint attention projects queries, keys and values from the same tokens. Use "
        "targets=['attn'] and a method that merges queries too, such as 'tome'"
    ),
    "stack": "text tokens pass from block to block as well. Write targets='block'",
}


class SD3(PatchTransformer):
    """``SD3Transformer2DModel``.

    Targets: ``attn`` = ``attn`` and, in blocks of SD 3.5 that have it, the parallel self-attention
    ``attn2``; ``mlp`` = ``ff`` (the image stream's).
    """

    description = "Stable Diffusion 3 and 3.5 (SD3Transformer2DModel)"
    class_names = ("SD3Transformer2DModel",)
    timestep_position = 3

    def blocks(self, network: nn.Module) -> list[Block]:
        flags = dict(output_index={"block": 1}, joint=("attn", "block"), refused=REFUSED)
        return [
            block
            if block.module.attn2 is None
            else replace(block, second_attention={"attn": block.module.attn2})
            for block in blocks_of(network, "transformer_blocks", **flags)
        ]
