# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CogView 3 Plus and 4 in diffusers: images, with blocks like those of :mod:`.cogvideox`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, blocks_of
from .cogvideox import CogVideoX
from .dit import PatchTransformer
from .sd3 import REFUSED

_TWICE = (
    "one feed-forward runs on the image tokens and then on the text tokens. Write "
    "targets=['attn'] or targets='block'"
)


class CogView3Plus(CogVideoX):
    """``CogView3PlusTransformer2DModel``. Targets: ``attn`` = ``attn1``, ``mlp`` = ``ff``.

    Positions are added to the tokens once, before the first block.
    """

    description = "CogView 3 Plus (CogView3PlusTransformer2DModel)"
    class_names = ("CogView3PlusTransformer2DModel",)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        return PatchTransformer().grid(grid_module, args, kwargs)


class CogView4(CogView3Plus):
    """``CogView4Transformer2DModel``. Target: ``attn`` = ``attn1``; rotary embeddings."""

    description = "CogView 4 (CogView4Transformer2DModel)"
    class_names = ("CogView4Transformer2DModel",)
    takes_masks = True  # they cover text only

    def blocks(self, network: nn.Module) -> list[Block]:
        flags = dict(joint=("attn", "block"), refused={**REFUSED, "mlp": _TWICE})
        return blocks_of(network, "transformer_blocks", attn="attn1", mlp=None, **flags)
