# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Qwen-Image in diffusers: two streams that meet in joint attention, complex rotary embeddings.

A block is called with the picture's tokens and the text's and returns (text, picture), its
attention (picture, text). The rotary table is a pair, of the picture's rows and of the text's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block, Host
from .dit import is_a
from .rotary import merge_rotary
from .sd3 import REFUSED

# Positions of a block's arguments where it is called under gradient checkpointing.
_TABLE, _MODULATION = 4, 6


class QwenImage(Host):
    """Host for ``QwenImageTransformer2DModel``. Sites: ``attn`` = ``attn``, ``mlp`` = ``img_mlp``.

    Grid: the frames, rows and columns of ``img_shapes``; pictures with reference pictures beside
    them (Qwen-Image-Edit) lie on no one grid.
    """

    description = "Qwen-Image (QwenImageTransformer2DModel)"
    timestep_position = 3

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "QwenImageTransformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn, "mlp": block.img_mlp},
                returns={"block": 1},
                joint=("attn", "block"),
                refused=REFUSED,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]

    def noise_level(self, timestep: float) -> float:
        # Pipelines divide by 1000 before the call.
        return timestep

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        shapes = args[4] if len(args) > 4 else kwargs["img_shapes"]
        pictures = shapes[0] if isinstance(shapes, list) else shapes
        if isinstance(pictures, list):
            if len(pictures) > 1:
                raise ToMeError(
                    f"img_shapes has {len(pictures)} pictures in one sequence (reference pictures, "
                    "layers), which lie on no one grid to merge on; call the model without token "
                    "merging"
                )
            pictures = pictures[0]
        frames, height, width = pictures
        return frames * height, width

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[_MODULATION] if len(args) > _MODULATION else kwargs.get("modulate_index")
        if modulation is not None:
            raise ToMeError(
                f"{site} is given a modulation per token (modulate_index), which does not fit "
                "merged tokens; write sites=['attn', 'mlp']"
            )
        if len(args) > _TABLE:
            table = self._merged(args[_TABLE], plan)
            return (*args[:_TABLE], table, *args[_TABLE + 1 :]), kwargs
        table = kwargs.get("image_rotary_emb")
        if table is None:
            return args, kwargs
        return args, {**kwargs, "image_rotary_emb": self._merged(table, plan)}

    def _merged(self, table: tuple, plan: Any) -> tuple:
        picture, text = table
        return merge_rotary(picture, plan), text
