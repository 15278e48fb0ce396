# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Qwen-Image in diffusers: two streams with joint attention, complex rotary embeddings.

A block receives image and text tokens and returns (text, image); its attention returns (image,
text). The rotary table is a pair: rows of the image tokens, rows of the text tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block, ModelAdapter, blocks_of
from .rotary import merge_rotary
from .sd3 import REFUSED

# Positions of a block's arguments when it is called under gradient checkpointing.
_TABLE, _MODULATION = 4, 6


class QwenImage(ModelAdapter):
    """``QwenImageTransformer2DModel``. Targets: ``attn`` = ``attn``, ``mlp`` = ``img_mlp``.

    Grid: frames, rows and columns of ``img_shapes``. Sequences with reference images
    (Qwen-Image-Edit) have no single grid and are an error.
    """

    description = "Qwen-Image (QwenImageTransformer2DModel)"
    class_names = ("QwenImageTransformer2DModel",)
    timestep_position = 3
    timestep_scale = 1.0

    def blocks(self, network: nn.Module) -> list[Block]:
        flags = dict(output_index={"block": 1}, joint=("attn", "block"), refused=REFUSED)
        return blocks_of(network, "transformer_blocks", mlp="img_mlp", **flags)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        shapes = args[4] if len(args) > 4 else kwargs["img_shapes"]
        images = shapes[0] if isinstance(shapes, list) else shapes
        if isinstance(images, list):
            if len(images) > 1:
                raise ToMeError(
                    f"img_shapes has {len(images)} images in one sequence (reference images, "
                    "layers), so there is no single grid to merge on; call the model without "
                    "token merging"
                )
            images = images[0]
        frames, height, width = images
        return frames * height, width

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[_MODULATION] if len(args) > _MODULATION else kwargs.get("modulate_index")
        if modulation is not None:
            raise ToMeError(
                f"{target} received a modulation per token (modulate_index), which does not fit "
                "merged tokens; write targets=['attn', 'mlp']"
            )
        if len(args) > _TABLE:
            table = _merged(args[_TABLE], plan)
            return (*args[:_TABLE], table, *args[_TABLE + 1 :]), kwargs
        table = kwargs.get("image_rotary_emb")
        if table is None:
            return args, kwargs
        return args, {**kwargs, "image_rotary_emb": _merged(table, plan)}


def _merged(table: tuple, plan: Any) -> tuple:
    image, text = table
    return merge_rotary(image, plan), text
