# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers with one stream: DiT, PixArt-alpha and -sigma in diffusers.

One stack of ``BasicTransformerBlock`` over the patches of the latent. Text, if any, enters by
cross-attention only, so no sequence contains text tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, ModelAdapter, blocks_of, is_a
from .diffusers_unet import TARGETS, mask_argument


class PatchTransformer(ModelAdapter):
    """Transformers over the patches of a (B, C, h, w) latent. All blocks share the patch grid."""

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        patch = grid_module.config.patch_size
        return latent.shape[-2] // patch, latent.shape[-1] // patch


class PixArt(PatchTransformer):
    """``PixArtTransformer2DModel`` and ``Transformer2DModel`` over patches.

    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    """

    description = (
        "PixArt-alpha and -sigma (PixArtTransformer2DModel, Transformer2DModel over patches)"
    )
    class_names = ("PixArtTransformer2DModel",)
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        patches = is_a(module, "Transformer2DModel") and getattr(module, "is_input_patches", False)
        return patches or super().matches(module)

    def blocks(self, network: nn.Module) -> list[Block]:
        mask = mask_argument(network.transformer_blocks)
        return blocks_of(network, "transformer_blocks", **TARGETS, mask_argument=mask)


class DiT(PixArt):
    """``DiTTransformer2DModel``: class labels instead of text, no cross-attention."""

    description = "DiT (DiTTransformer2DModel)"
    class_names = ("DiTTransformer2DModel",)
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, *self.class_names)
