# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers as targets: timm's for images and VideoMAE's for clips, random weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from ..vit import ViTConfig, apply_tome_vit, find_vit
from .kinds import Call, Merging, Noise, Shape

FRAMES, TUBELET = 16, 2


class ViTMerging(Merging):
    """``apply_tome_vit``, and an ideal for each block."""

    def options(self, args: argparse.Namespace) -> dict[str, Any]:
        for name, value in (("--ratio", args.ratio), ("--max-downsample", args.max_downsample)):
            if value is not None:
                raise ToMeError(f"{name} is for denoisers; for {args.target} write --r")
        if args.r == 0:
            raise ToMeError("--r 0 merges nothing: there is nothing to compare")
        return dict(r=8 if args.r is None else args.r)

    def config(self, options: Mapping[str, Any]) -> ViTConfig:
        options = dict(options)
        if options.get("target_speedup") is not None:
            options["r"] = None  # --r has a default
        return ViTConfig(**options)

    def ours(self, network: nn.Module, config: ViTConfig, run: Call) -> list[dict[str, Any]]:
        handle = apply_tome_vit(network, **config.to_dict())
        run(network)
        names = [block.name for block in find_vit(network).blocks]
        return [
            dict(block=name, kind="block", tokens=before, kept=after)
            for name, (before, after) in zip(names, handle.tokens)
        ]

    def ideal(self, network: nn.Module, sites: list[dict[str, Any]], run: Call) -> None:
        """Every block drops its last tokens behind the attention: no matching, no averages, no
        proportional attention, nothing copied."""
        blocks = {block.name: block for block in find_vit(network).blocks}
        for site in sites:
            if site["kept"] == site["tokens"]:
                continue
            block, first = blocks[site["block"]], _First(site["kept"])
            block.norm.register_forward_pre_hook(first.of_input)
            block.last.register_forward_hook(_One())
            block.module.register_forward_hook(first.of_output)
        run(network)


class _First:
    """The first tokens of what goes into or comes out of a module."""

    def __init__(self, kept: int) -> None:
        self.kept = kept

    def of_input(self, module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, : self.kept], *args[1:])

    def of_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, : self.kept]


class _One:
    """One token of the feed-forward's, which the residual addition spreads over all for nothing."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, :1]


VIT_MERGING = ViTMerging()


@dataclass(frozen=True)
class ViTShape(Shape):
    """A vision transformer for images or clips.

    Attributes:
        width, depth, heads, patch: of the transformer.
        clips (bool): VideoMAE on 16 frames, two to a token; default False: timm's on images.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    clips: bool = False

    @property
    def merging(self) -> Merging:
        return VIT_MERGING

    @property
    def unit(self) -> int:
        return self.patch

    def network(self) -> nn.Module:
        if self.clips:
            return _videomae(self)
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as error:
            raise ToMeError("vision transformers as targets need timm: pip install timm") from error
        return VisionTransformer(
            img_size=self.size,
            patch_size=self.patch,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            dynamic_img_size=True,
        )

    def call(self, network: nn.Module, size: tuple[int, int], batch: int, noise: Noise) -> Call:
        if self.clips:
            x = noise(batch, FRAMES, 3, *size)
            if size != (self.size, self.size):
                raise ToMeError(f"this target has clips of {self.size}x{self.size} only")
            return lambda network: network(x).logits
        x = noise(batch, 3, *size)
        return lambda network: network(x)

    def activations(self, size: tuple[int, int], batch: int, written_out: bool) -> int:
        tokens = (size[0] // self.patch) * (size[1] // self.patch) + 1
        if self.clips:
            tokens *= FRAMES // TUBELET
        # Input, tokens, queries, keys and values or the feed-forward's inside.
        count = tokens * 10 * self.width
        if written_out:
            count += 2 * self.heads * tokens**2
        return batch * count


def _videomae(shape: ViTShape) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=shape.size,
        patch_size=shape.patch,
        num_frames=FRAMES,
        tubelet_size=TUBELET,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        num_labels=400,
    )
    return VideoMAEForVideoClassification(config)


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}

VITS: dict[str, Shape] = {
    **{
        f"vit-{letter}{patch}": ViTShape(
            f"ViT-{letter.upper()}/{patch}", 224, 8, "images", *sizes, patch
        )
        for letter, sizes in _SIZES.items()
        for patch in (16, 14)
    },
    **{
        f"videomae-{letter}": ViTShape(
            f"VideoMAE ViT-{letter.upper()}, 16 frames", 224, 1, "clips", *_SIZES[letter], 16, True
        )
        for letter in ("b", "l")
    },
}
