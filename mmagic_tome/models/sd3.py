# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Stable Diffusion 3 and 3.5, AuraFlow and Qwen-Image in diffusers: joint attention.

A block receives image tokens (``hidden_states``) and text tokens (``encoder_hidden_states``) and
returns (text, image); its attention returns (image, text). Only image tokens are merged. Positions
are added to the tokens once, before the first block, except in Qwen-Image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block, argument, with_changed
from .rotary import merge_rotary
from .transformer import JOINT, TEXT_FIRST, Transformer


class SD3(Transformer):
    """``SD3Transformer2DModel``.

    Targets: ``attn`` = ``attn`` and, in blocks of SD 3.5 that have it, the parallel self-attention
    ``attn2``; ``mlp`` = ``ff`` (the image stream's).
    """

    description = "Stable Diffusion 3 and 3.5 (SD3Transformer2DModel)"
    class_names = ("SD3Transformer2DModel",)
    timestep_position = 3
    lists = (("transformer_blocks", TEXT_FIRST),)

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            block
            if block.module.attn2 is None
            else replace(block, second_attention={"attn": block.module.attn2})
            for block in super().blocks(network)
        ]


class AuraFlow(Transformer):
    """``AuraFlowTransformer2DModel``: joint blocks like those of Stable Diffusion 3, then single
    blocks on one sequence: register and text tokens first, then image tokens."""

    description = "AuraFlow (AuraFlowTransformer2DModel)"
    class_names = ("AuraFlowTransformer2DModel",)
    timestep_position = 2
    timestep_scale = 1.0
    lists = (
        ("joint_transformer_blocks", TEXT_FIRST),
        ("single_transformer_blocks", dict(JOINT, joint_sequence=("attn", "mlp", "block"))),
    )


class QwenImage(Transformer):
    """``QwenImageTransformer2DModel``. Targets: ``attn`` = ``attn``, ``mlp`` = ``img_mlp``.

    The rotary table is a pair: rows of the image tokens, rows of the text tokens. Sequences with
    reference images (Qwen-Image-Edit) have no single grid and are an error.
    """

    description = "Qwen-Image (QwenImageTransformer2DModel)"
    class_names = ("QwenImageTransformer2DModel",)
    timestep_position = 3
    timestep_scale = 1.0
    lists = (("transformer_blocks", dict(TEXT_FIRST, mlp="img_mlp")),)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        shapes = argument(args, kwargs, 4, "img_shapes")
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

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Positions are those of a block's arguments under gradient checkpointing.
        if argument(args, kwargs, 6, "modulate_index") is not None:
            raise ToMeError(
                f"{target} received a modulation per token (modulate_index), which does not fit "
                "merged tokens; write targets=['attn', 'mlp']"
            )
        return with_changed(args, kwargs, 4, "image_rotary_emb", _merged_image_rows, plan)


def _merged_image_rows(table: tuple, plan: Any) -> tuple:
    image, text = table
    return merge_rotary(image, plan), text
