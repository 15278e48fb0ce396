# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Stable Diffusion 3 and 3.5 in diffusers: two streams that meet in joint attention.

A block is called with the picture's tokens (``hidden_states``) and the text's
(``encoder_hidden_states``) and returns (text, picture); so is its attention, which returns
(picture, text). Merging touches the picture's only. Positions are part of the tokens from the
start, so nothing has to follow them.
"""

from __future__ import annotations

from torch import nn

from .base import Block
from .dit import PatchTransformer, is_a

# Of blocks with two streams, here and in flux.py.
REFUSED = {
    "attn_kv": (
        "joint attention takes queries, keys and values from the same tokens. Use sites=['attn'] "
        "and a method that merges queries too, such as 'tome'"
    ),
    "stack": ("the text goes from block to block beside the picture's tokens. Write sites='block'"),
}


class SD3(PatchTransformer):
    """Host for ``SD3Transformer2DModel``.

    Sites: ``attn`` = ``attn`` and, in blocks of SD 3.5 that have it, the self-attention ``attn2``
    beside it; ``mlp`` = ``ff`` (the picture's).
    """

    description = "Stable Diffusion 3 and 3.5 (SD3Transformer2DModel)"
    timestep_position = 3

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "SD3Transformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn, "mlp": block.ff},
                twins={} if block.attn2 is None else {"attn": block.attn2},
                returns={"block": 1},
                joint=("attn", "block"),
                refused=REFUSED,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]
