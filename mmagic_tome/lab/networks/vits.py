# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers: timm's for images and VideoMAE for clips."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...errors import ToMeError
from .base import Arguments, Network

FRAMES, TUBELET = 16, 2
# Width, depth, heads.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def vit(about: str, width: int, depth: int, heads: int, patch: int = 16, size: int = 224):
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

    return Network(about, make, inputs, size=size, batch=8, unit=patch, denoises=False)


def videomae(about: str, width: int, depth: int, heads: int, patch: int = 16, size: int = 224):
    """A VideoMAE classifier of transformers as a :class:`Network`; its batch is in clips."""

    def make() -> nn.Module:
        from transformers import VideoMAEConfig, VideoMAEForVideoClassification

        config = VideoMAEConfig(
            image_size=size,
            patch_size=patch,
            num_frames=FRAMES,
            tubelet_size=TUBELET,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            num_labels=400,
        )
        return VideoMAEForVideoClassification(config)

    def inputs(network, given, batch, noise) -> Callable[[int], Arguments]:
        x = noise(batch, FRAMES, 3, *given)
        return lambda time: ((x,), {})

    # Its position embeddings are of one size only.
    return Network(about, make, inputs, size=size, batch=1, unit=size, denoises=False)


VITS = {
    **{
        f"vit-{letter}{patch}": vit(f"ViT-{letter.upper()}/{patch}", *sizes, patch)
        for letter, sizes in _SIZES.items()
        for patch in (16, 14)
    },
    **{
        f"videomae-{letter}": videomae(f"VideoMAE ViT-{letter.upper()}", *_SIZES[letter])
        for letter in ("b", "l")
    },
}
