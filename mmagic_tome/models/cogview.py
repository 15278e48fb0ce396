# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CogView 3 Plus and 4 in diffusers: pictures, with the blocks of :mod:`.cogvideox` and alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block
from .cogvideox import CogVideoX
from .dit import PatchTransformer, is_a
from .sd3 import REFUSED

_TWICE = (
    "one feed-forward serves picture and text there, one after the other. Write sites=['attn'] or "
    "sites='block'"
)


class CogView3Plus(CogVideoX):
    """Host for ``CogView3PlusTransformer2DModel``. Sites: ``attn`` = ``attn1``, ``mlp`` = ``ff``.

    Positions are part of the tokens from the start.
    """

    description = "CogView 3 Plus (CogView3PlusTransformer2DModel)"

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "CogView3PlusTransformer2DModel")

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        return PatchTransformer().grid(stack, args, kwargs)


class CogView4(CogView3Plus):
    """Host for ``CogView4Transformer2DModel``. Site: ``attn`` = ``attn1``; rotary embeddings."""

    description = "CogView 4 (CogView4Transformer2DModel)"
    takes_masks = True  # they are the text's

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "CogView4Transformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn1},
                joint=("attn", "block"),
                refused={**REFUSED, "mlp": _TWICE},
            )
            for index, block in enumerate(network.transformer_blocks)
        ]
