# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of timm."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...errors import ToMeError
from .base import Arguments, Network

# Width, depth, heads.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def vit(width: int, depth: int, heads: int, patch: int = 16, size: int = 224):
    """A vision transformer of timm as a :class:`Network`; its batch is in images."""

    def make() -> nn.Module:
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as error:
            raise ToMeError("vision transformers by name need timm: pip install timm") from error
        return VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            dynamic_img_size=True,
        )

    def inputs(network, size, batch, noise) -> Callable[[int], Arguments]:
        x = noise(batch, 3, *size)
        return lambda time: ((x,), {})

    return Network(make, inputs, size=size, batch=8, unit=patch, denoises=False)


VITS = {
    f"vit-{letter}{patch}": vit(*sizes, patch)
    for letter, sizes in _SIZES.items()
    for patch in (16, 14)
}
