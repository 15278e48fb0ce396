# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""DiT, PixArt-alpha and -sigma, Hunyuan-DiT in diffusers: one stream over the patches of an image.

Text, if any, enters by cross-attention only, so no sequence contains text tokens. Targets: ``attn``
= ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import is_a
from .transformer import BASIC, ROTARY, RotaryTransformer, Transformer


class DiT(Transformer):
    """``DiTTransformer2DModel``: class labels instead of text, no cross-attention."""

    description = "DiT (DiTTransformer2DModel)"
    class_names = ("DiTTransformer2DModel",)
    timestep_position = 1
    lists = (("transformer_blocks", dict(BASIC, mask_argument="attention_mask")),)


class PixArt(DiT):
    """``PixArtTransformer2DModel`` and ``Transformer2DModel`` over patches."""

    description = (
        "PixArt-alpha and -sigma (PixArtTransformer2DModel, Transformer2DModel over patches)"
    )
    class_names = ("PixArtTransformer2DModel",)
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        patches = is_a(module, "Transformer2DModel") and getattr(module, "is_input_patches", False)
        return patches or super().matches(module)


class HunyuanDiT(RotaryTransformer):
    """Rotary embeddings apply to queries of cross-attention too. Long skips: blocks of the second
    half receive the output of a block of the first half."""

    description = "Hunyuan-DiT (HunyuanDiT2DModel)"
    class_names = ("HunyuanDiT2DModel",)
    timestep_position = 1
    lists = (("blocks", ROTARY),)

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if isinstance(kwargs.get("skip"), Tensor):
            kwargs = {**kwargs, "skip": plan.merge(kwargs["skip"])}
        return super().adapt(target, plan, args, kwargs)
