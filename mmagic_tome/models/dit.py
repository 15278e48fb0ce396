# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Diffusion transformers of one stream: DiT, PixArt-alpha and -sigma in diffusers.

One stack of ``BasicTransformerBlock`` over the patches of the latent. Text, where there is any,
comes in by cross-attention only, so no sequence holds it and nothing can merge it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, Host
from .diffusers_unet import SITES, mask_argument


class PatchTransformer(Host):
    """What transformers over the patches of a (B, C, h, w) latent have in common.

    All blocks see the same grid, that of the patches; it is level 1 of ``max_downsample``.
    """

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        patch = stack.config.patch_size
        return latent.shape[-2] // patch, latent.shape[-1] // patch


class PixArt(PatchTransformer):
    """Host for ``PixArtTransformer2DModel`` and ``Transformer2DModel`` over patches.

    Sites: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    """

    description = (
        "PixArt-alpha and -sigma (PixArtTransformer2DModel, Transformer2DModel of patches)"
    )
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        patches = is_a(module, "Transformer2DModel") and getattr(module, "is_input_patches", False)
        return is_a(module, "PixArtTransformer2DModel") or patches

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={
                    kind: getattr(block, attribute)
                    for kind, attribute in SITES.items()
                    if getattr(block, attribute, None) is not None
                },
                mask_argument=mask_argument(block.attn1),
            )
            for index, block in enumerate(network.transformer_blocks)
        ]


class DiT(PixArt):
    """Host for ``DiTTransformer2DModel``: a class in place of the text, no cross-attention."""

    description = "DiT (DiTTransformer2DModel)"
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "DiTTransformer2DModel")


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a class of that name is among the module's own and its bases.

    By name, so that diffusers need not be imported for the question to be asked. Unlike UNets,
    transformers whose attributes look alike differ in what their blocks are called with.
    """
    return any(base.__name__ == name for base in type(module).__mro__)
